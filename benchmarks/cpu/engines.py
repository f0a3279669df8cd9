"""What is compared: an engine at a precision, with what it loads and how it is started."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cpu.places import Places

PRECISIONS = ("bf16", "int8", "int4")
DEFAULT_ENGINES = ("powerband", "openvino", "vllm", "vllm-eager", "llama")
QUICK_ENGINES = ("powerband", "openvino", "vllm", "llama")
ENGINES = (*DEFAULT_ENGINES, "vllm-zen")


@dataclass(frozen=True)
class Variant:
    name: str
    engine: str  # as in --engines
    kind: str  # the module that drives it: engine_<kind>.py, or llama.py
    precision: str
    form: str = "checkpoint"  # of the model, as in Places.model
    options: dict[str, Any] = field(default_factory=dict)  # the engine's own
    rows: str = "abcdefgh"  # those that it can do

    @property
    def is_ours(self) -> bool:
        return self.engine == "powerband"

    @property
    def peer(self) -> str:
        """What must be installed for it; nothing for ours."""
        return "" if self.is_ours else self.engine.removesuffix("-eager")

    def python(self, places: Places) -> str:
        """llama.cpp's tools are driven from here."""
        return sys.executable if self.is_ours or self.kind == "llama" else places.python(self.peer)


def _vllm(engine: str, **options: Any) -> Variant:
    return Variant(f"{engine}-bf16", engine, "vllm", "bf16", options=options)


_ALL = (
    Variant("powerband-bf16", "powerband", "powerband", "bf16"),
    Variant("openvino-bf16", "openvino", "openvino", "bf16", "openvino-bf16", rows="abcdefg"),
    _vllm("vllm"),
    _vllm("vllm-eager", enforce_eager=True),
    _vllm("vllm-zen"),
    Variant("llama-bf16", "llama", "llama", "bf16", "bf16.gguf", rows="abcdfgh"),
    Variant("powerband-int8", "powerband", "powerband", "int8", options={"quantization": "int8"}),
    Variant("openvino-int8", "openvino", "openvino", "int8", "openvino-int8", rows="abcdefg"),
    Variant("llama-q8_0", "llama", "llama", "int8", "q8_0.gguf", rows="abcdfgh"),
    Variant("powerband-int4", "powerband", "powerband", "int4", options={"quantization": "int4"}),
    Variant("openvino-int4", "openvino", "openvino", "int4", "openvino-int4", rows="abcdefg"),
    Variant("llama-q4_0", "llama", "llama", "int4", "q4_0.gguf", rows="abcdfgh"),
    Variant("llama-q4_k_m", "llama", "llama", "int4", "q4_k_m.gguf", rows="abcdfgh"),
)


def variants(engines: Collection[str], precisions: Collection[str]) -> list[Variant]:
    return [variant for variant in _ALL if variant.engine in engines and variant.precision in precisions]
