"""Everything that needs a GPU, in one run: are the kernels right, are whole models right, and how fast is a step?

    python benchmarks/gpu_check.py                          # all, on the first GPU
    python benchmarks/gpu_check.py --device cpu --quick     # what can be checked without one

1. kernels   tests/kernels, on the device: Triton's kernels against the reference backend.
2. parity    tiny random models of every family against transformers' greedy search in float32, with CUDA graphs on and
             off, overlap on and off.
3. speed     decode steps, prefill steps and whole generations on the shapes of Qwen3-0.6B and Llama-3.1-8B with random
             weights, beside the roofline: the larger of bytes that must be read over the bandwidth, and FLOPs over the
             matrix rate, both measured here first.

It imports only torch, Triton, transformers and this project's engine, no server. On a CPU, Triton's kernels are checked
only where TRITON_INTERPRET=1 is set and Triton is installed. Exit code 1: something was wrong.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "engine")]

import torch  # noqa: E402 (the path comes first)
from gpu_rig import BLOCK_SIZE, SEED, Rig, Stepper, even_batch, repeated_s, timed  # noqa: E402

from powerband.engine.attention import AttentionShape, BackendSelection, make_backend  # noqa: E402
from powerband.spec.model.counts import count_parameters, kv_bytes_per_token, step_flops  # noqa: E402
from powerband.spec.model.model_spec import ModelSpec  # noqa: E402
from powerband.spec.model.reader import read_model_spec  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "numpy")

_ATTENTION_1B = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **_ATTENTION_1B,
    },
    "Llama-3.1-8B": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}
SHAPES["tiny"] = SHAPES["Qwen3-0.6B"] | {"vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 2}


# ---- 1. kernels


def check_kernels(device: torch.device) -> dict[str, Any]:
    if find_spec("triton") is None:
        return {"ok": None, "detail": "Triton is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "tests/kernels"]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    print(done.stdout[-4000:] if done.returncode else done.stdout.strip().splitlines()[-1])
    return {"ok": done.returncode == 0, "detail": done.stdout.strip().splitlines()[-1], "device": str(device)}


# ---- 2. whole models


def check_parity(device: torch.device, attention: str, quick: bool) -> list[dict[str, Any]]:
    from models_for_tests import FAMILIES, NEW_TOKENS, healthy_model, save

    rows = []
    # Triton's interpreter takes a second for what a GPU does in a microsecond.
    num_prompts, num_tokens = (3, 4) if device.type == "cpu" and attention == "triton" else (None, NEW_TOKENS)
    for family in list(FAMILIES)[:: 4 if quick else 1]:
        model, oracle = healthy_model(family)
        prompts, expected = oracle.prompts[:num_prompts], [c[:num_tokens] for c in oracle.continuations[:num_prompts]]
        with tempfile.TemporaryDirectory() as name:
            folder = save(model, Path(name))
            for graphs in (False, True):
                for overlap in (False, True):
                    rig = Rig(
                        read_model_spec(folder),
                        folder,
                        device,
                        overlap=overlap,
                        graphs=graphs,
                        attention=attention,
                        dtype=torch.float32,
                        max_model_len=512,
                        num_blocks=64,
                        max_num_batched_tokens=256,
                    )
                    tokens = rig.generate(prompts, num_tokens)
                    captured = rig.captures
                    rig.close()
                    wrong = sum(ours != theirs for ours, theirs in zip(tokens, expected, strict=True))
                    rows.append({"family": family, "graphs": captured, "overlap": overlap, "wrong": wrong})
        shown = ", ".join(f"graphs={r['graphs']:d} overlap={r['overlap']:d}: {r['wrong']} wrong" for r in rows[-4:])
        print(f"{family:14s} {shown}", flush=True)
    return rows


# ---- 3. speed


def measure_limits(device: torch.device, quick: bool) -> dict[str, float]:
    """Bytes per second of a copy (read and written), and FLOPs per second of a bfloat16 product of random matrices."""
    size = 1 << (24 if quick else 31)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    side = 512 if quick else 8192
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    copies, products = [], []
    for _ in range(8):
        with timed(device) as seconds:
            target.copy_(source)
        copies.append(seconds())
        with timed(device) as seconds:
            a @ b
        products.append(seconds())
    return {
        "bandwidth_bytes_per_s": 2 * size / statistics.median(copies[3:]),
        "matrix_flops_per_s": 2 * side**3 / statistics.median(products[3:]),
    }


def roofline_s(spec: ModelSpec, works: list[tuple[int, int]], limits: dict[str, float]) -> float:
    """The least time for one step over (new tokens, context): all weights and the visible KV once, or all FLOPs."""
    counts = count_parameters(spec)
    weights = 2 * (counts.total - (0 if spec.tie_embeddings else counts.embedding))
    cache = kv_bytes_per_token(spec, "bfloat16") * sum(context for _, context in works)
    flops = step_flops(spec, works, len(works)).total
    return max((weights + cache) / limits["bandwidth_bytes_per_s"], flops / limits["matrix_flops_per_s"])


def measure_attention(device: torch.device, attention: str, limits: dict[str, float], quick: bool) -> list[Any]:
    """One layer's attention alone, on Llama-3.1-8B's heads: reading KV for decodes, arithmetic for chunks."""
    backend = make_backend(BackendSelection(attention, "measured"), BLOCK_SIZE, device)
    shape = AttentionShape(num_heads=32, num_kv_heads=8, head_dim=128, scale=128**-0.5)
    cases = [(1, 64, 4), (64, 64, 1)] if quick else [(1, 1024, 1), (1, 8192, 1), (1, 8192, 32), (1, 1024, 256)]
    cases += [] if quick else [(2048, 2048, 1), (8192, 8192, 1), (512, 8192, 4)]
    backend.allocate(1, max(rows * (context // BLOCK_SIZE) for _, context, rows in cases), shape, torch.bfloat16)
    results = []
    print()
    for new, context, rows in cases:
        batch = even_batch(new, context, rows, device)
        q, k, v = (torch.randn(new * rows, heads, 128, device=device, dtype=torch.bfloat16) for heads in (32, 8, 8))
        seconds = repeated_s(lambda q=q, k=k, v=v, b=batch: backend.attend(0, q, k, v, b, shape), device, quick)
        kv_bytes = rows * context * 2 * 8 * 128 * 2
        flops = rows * 4 * 32 * 128 * (new * context - new * (new - 1) // 2)
        best = max(kv_bytes / limits["bandwidth_bytes_per_s"], flops / limits["matrix_flops_per_s"])
        results.append(_row("decode" if new == 1 else "chunk", rows, context, seconds, new * rows / seconds, best))
        results[-1]["new_tokens"] = new
    return results


def measure_shape(name: str, device: torch.device, attention: str, limits: dict[str, float], quick: bool) -> list[Any]:
    spec = read_model_spec(SHAPES[name])
    batches, contexts = ((1, 4), (64,)) if quick else ((1, 8, 32, 128, 256), (128, 2048, 8192))
    num_steps = 4 if quick else 64
    longest = max(contexts) + num_steps + 64
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 28
    weights = 2 * count_parameters(spec).total
    num_blocks = min(
        int((free * 0.85 - weights) / (BLOCK_SIZE * kv_bytes_per_token(spec, "bfloat16"))),
        max(batches) * (longest // BLOCK_SIZE + 1),
    )
    rows: list[Any] = []
    for graphs, overlap in ((True, True), (True, False), (False, True), (False, False)):
        options = {"attention": attention, "load_format": "dummy", "max_rows": max(batches), "num_blocks": num_blocks}
        options |= {"dtype": torch.bfloat16, "max_model_len": longest, "max_num_batched_tokens": 8192}
        with timed(device) as start_s:
            rig = Rig(spec, Path("."), device, overlap=overlap, graphs=graphs, **options)
        mode = {"shape": name, "graphs": rig.captures, "overlap": overlap, "start_s": start_s()}
        stepper = Stepper(rig)
        print(f"\n{name}, graphs {rig.captures}, overlap {overlap}, start {start_s():.1f} s")
        for context in contexts if graphs and overlap else contexts[:2]:
            for batch in batches:
                if batch * ((context + num_steps + 8) // BLOCK_SIZE + 1) > num_blocks:
                    continue
                seconds = stepper.decode_seconds(batch, context, num_steps)
                best = roofline_s(spec, [(1, context)] * batch, limits)
                rows.append(mode | _row("decode", batch, context, seconds, batch / seconds, best))
        if graphs and overlap:
            for num_tokens in (64,) if quick else (512, 2048, 8192):
                seconds = stepper.prefill_seconds(num_tokens, 3)
                best = roofline_s(spec, [(num_tokens, num_tokens)], limits)
                rows.append(mode | _row("prefill", 1, num_tokens, seconds, num_tokens / seconds, best))
        batch, prompt, output = (4, 32, 8) if quick else (64, 512, 128)
        prompts = [[(i * 31 + p * 7) % spec.vocab_size for p in range(prompt)] for i in range(batch)]
        rig.generate(prompts[:3], 2)  # compiles what is not compiled yet
        with timed(device) as seconds_of:
            rig.generate(prompts, output)
        rows.append(mode | _row("generate", batch, prompt, seconds_of(), batch * output / seconds_of(), None))
        rig.close()
    return rows


def _row(what: str, batch: int, context: int, seconds: float, tokens_per_s: float, best_s: float | None) -> Any:
    share = None if best_s is None else best_s / seconds
    shown = "" if share is None else f"   {share:6.1%} of the roofline ({best_s * 1e3:.3f} ms)"
    figures = f"{seconds * 1e3:9.3f} ms, {tokens_per_s:10.0f} tokens/s"
    print(f"  {what:8s} batch {batch:4d}, context {context:6d}: {figures}{shown}", flush=True)
    return {
        "what": what,
        "batch": batch,
        "context": context,
        "seconds": seconds,
        "tokens_per_s": tokens_per_s,
        "roofline_s": best_s,
        "share": share,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a few families and tiny shapes")
    parser.add_argument("--only", choices=["kernels", "parity", "speed"], nargs="*")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu_check.json")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    parts = arguments.only or ["kernels", "parity", "speed"]
    runs_triton = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    attention = "triton" if runs_triton and find_spec("triton") is not None else "reference"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {p: importlib.metadata.version(p) for p in PACKAGES if find_spec(p) is not None}
    report: dict[str, Any] = {
        "benchmark": "gpu_check",
        "seed": SEED,
        "machine": {"device": name, "system": platform.platform()},
        "versions": versions | {"python": platform.python_version()},
        "attention": attention,
    }
    print(f"{name}, attention: {attention}, {versions}")
    if "kernels" in parts:
        report["kernels"] = check_kernels(device)
    if "parity" in parts:
        report["parity"] = check_parity(device, attention, arguments.quick)
    if "speed" in parts:
        report["limits"] = limits = measure_limits(device, arguments.quick)
        gigabytes, teraflops = limits["bandwidth_bytes_per_s"] / 1e9, limits["matrix_flops_per_s"] / 1e12
        print(f"\nmeasured: {gigabytes:.0f} GB/s, {teraflops:.1f} TFLOP/s")
        if device.type == "cpu" or attention == "triton":  # the reference cannot be captured in a graph
            report["attention_speed"] = measure_attention(device, attention, limits, arguments.quick)
        names = ["tiny"] if arguments.quick else ["Qwen3-0.6B", "Llama-3.1-8B"]
        report["speed"] = [row for n in names for row in measure_shape(n, device, attention, limits, arguments.quick)]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    wrong = sum(row["wrong"] for row in report.get("parity", []))
    failed = wrong > 0 or report.get("kernels", {}).get("ok") is False
    print(f"\n{'FAILED' if failed else 'ok'}; written to {arguments.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
