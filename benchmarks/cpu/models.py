"""The model in every engine's own format, made once: checkpoint → OpenVINO's IR, GGUF and its quantizations."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.cpu.engines import Variant
from benchmarks.cpu.places import REPOSITORY, Places
from benchmarks.cpu.shapes import Shape
from benchmarks.cpu.steps import Steps

# optimum-cli's options by precision. int4: groups of 128, the embedding and the head in int8, as it does by default.
_EXPORT: dict[str, list[str]] = {
    "bf16": [],
    "int8": ["--weight-format", "int8"],
    "int4": ["--weight-format", "int4", "--group-size", "128", "--ratio", "1.0"],
}


def make(variant: Variant, shape: Shape, places: Places, steps: Steps) -> None:
    """Make what `variant` loads. Raises StepFailed."""
    checkpoint = places.model(shape.name, "checkpoint")
    if not (checkpoint / "model.safetensors.index.json").is_file():
        from benchmarks.cpu.checkpoint import write_checkpoint

        print(f"· {shape.name}: checkpoint with random weights", flush=True)
        write_checkpoint(shape, checkpoint)
    target = places.model(shape.name, variant.form)
    if variant.kind == "openvino" and not (target / "openvino_model.bin").is_file():
        shutil.rmtree(target, ignore_errors=True)
        command = [
            str(places.venv("openvino") / "bin" / "optimum-cli"),
            "export",
            "openvino",
            "--model",
            str(checkpoint),
        ]
        options = ["--task", "text-generation-with-past", *_EXPORT[variant.precision], str(target)]
        steps.once(f"{shape.name} {variant.name}", [*command, *options])
    if variant.kind == "llama":
        _gguf(variant, shape, places, steps, checkpoint)


def _gguf(variant: Variant, shape: Shape, places: Places, steps: Steps, checkpoint: Path) -> None:
    original = places.model(shape.name, "bf16.gguf")
    script = str(REPOSITORY / "benchmarks" / "cpu" / "gguf_script.py")
    if not original.is_file():
        partial = original.with_suffix(".partial")  # what is interrupted must not look finished
        steps.once(f"{shape.name} GGUF", [sys.executable, script, str(places.llama_cpp), str(checkpoint), str(partial)])
        partial.rename(original)
    target = places.model(shape.name, variant.form)
    if not target.is_file():
        kind = variant.form.removesuffix(".gguf").upper()
        partial = target.with_suffix(".partial")
        quantize = [str(places.llama_bin / "llama-quantize"), str(original), str(partial), kind]
        steps.once(f"{shape.name} {kind}", quantize)
        partial.rename(target)
