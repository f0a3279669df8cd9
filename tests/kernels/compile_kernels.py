"""Compile the kernels exactly as TritonAttention would launch them, for a GPU that need not be here.

    python tests/kernels/compile_kernels.py cuda 90 32        # or: hip gfx942 64

The launches are recorded from the backend itself, on small tensors of a CPU. Prints the kernels that were compiled.
"""

import sys
from contextlib import ExitStack
from unittest.mock import patch

import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from powerband.engine.attention import triton as backend
from powerband.engine.attention.base import AttentionBatch, AttentionShape, HeadNorm
from powerband.engine.kernels import fused_layers, grouped_matmul, stage_decodes

KERNELS = ("chunk_kernel", "decode_kernel", "combine_kernel", "rotary_store_kernel")
KERNEL = "grouped_matmul_kernel"
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# Shared memory that a program may take on Ampere and Ada workstation GPUs, the smallest among those of 16-bit matrices.
MAX_SHARED_BYTES = 101_376


class Recorder:
    """Stands where a kernel stands, and notes its launches in place of running it."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def record(dtype, shape, sinks):
    """The launches of one step: a decode and a chunk, norm and rotation included."""
    launches = []
    device = torch.device("cpu")
    batch = AttentionBatch(
        query_starts=torch.tensor([0, 1, 65], dtype=torch.int32),
        context_lens=torch.tensor([900, 64], dtype=torch.int32),
        block_tables=torch.zeros(2, 32, dtype=torch.int32),
        slots=torch.zeros(65, dtype=torch.int64),
        num_decodes=1,
        query_starts_host=[0, 1, 65],
        context_lens_host=[900, 64],
    )
    with ExitStack() as stack:
        for name in KERNELS:
            stack.enter_context(patch.object(backend, name, Recorder(getattr(backend, name), launches)))
        attention = backend.TritonAttention(32, device)
        attention._num_processors = 132
        attention.allocate(1, 40, shape, dtype)
        heads = shape.num_heads + 2 * shape.num_kv_heads
        qkv = torch.zeros(65, heads, shape.head_dim, dtype=dtype)
        rotation = (torch.zeros(65, 1, shape.head_dim, dtype=dtype),) * 2
        norm = HeadNorm(torch.zeros(heads, shape.head_dim), 1e-6)
        attention.attend_unrotated(0, qkv, rotation, norm, batch, shape, sinks)
    return launches


def record_layers(dtype):
    """The launches of norms and activations, by their Python faces."""
    launches = []
    x, weight = torch.zeros(4, 4096, dtype=dtype), torch.zeros(4096)
    with ExitStack() as stack:
        for name in ("rms_norm_kernel", "gated_kernel"):
            stack.enter_context(patch.object(fused_layers, name, Recorder(getattr(fused_layers, name), launches)))
        fused_layers.rms_norm(x, weight, 1e-6)
        for activation in fused_layers.ACTIVATIONS:
            fused_layers.gated(x, activation)
        stack.enter_context(patch.object(grouped_matmul, KERNEL, Recorder(getattr(grouped_matmul, KERNEL), launches)))
        offsets, order = torch.zeros(9, dtype=torch.int32), torch.zeros(8, dtype=torch.int64)
        weight, bias = torch.zeros(8, 128, 4096, dtype=dtype), torch.zeros(8, 128, dtype=dtype)
        grouped_matmul.grouped_matmul(x, weight, bias, offsets, order, 2)
        grouped_matmul.grouped_matmul(x.repeat(100, 1), weight, None, offsets)
    return launches


def compile_launch(kernel, args, options, target):
    params = kernel.params
    values = dict(zip((p.name for p in params), args, strict=False))
    constants = {p.name: options[p.name] for p in params if p.is_constexpr}
    signature, attributes = {}, {}
    for index, p in enumerate(params):
        value = values.get(p.name)
        if p.is_constexpr:
            signature[p.name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[p.name] = TYPES[value.dtype]
            if not p.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[p.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and not p.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    launch_options = {name: value for name, value in options.items() if name.startswith("num_")}
    return compile(ASTSource(kernel, signature, constants, attributes), target=target, options=launch_options)


def main():
    arch = sys.argv[2]
    target = GPUTarget(sys.argv[1], int(arch) if arch.isdigit() else arch, int(sys.argv[3]))
    ints, longs = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    tables = torch.zeros(4, 32, dtype=torch.int32)
    stage = (longs, longs, longs, ints, tables, longs, longs, longs, ints, tables, 3, 32, 32, 32)
    launches = [(stage_decodes.stage_decodes_kernel, stage, {"TILE": 128, "num_warps": 1})]
    llama = AttentionShape(32, 8, 128, 0.1)
    gemma = AttentionShape(8, 4, 256, 0.1, window=512, softcap=50.0)
    gpt_oss = AttentionShape(64, 8, 64, 0.1, window=128)
    launches += record(torch.bfloat16, llama, None)
    launches += record(torch.bfloat16, gemma, None)
    launches += record(torch.bfloat16, gpt_oss, torch.zeros(64, dtype=torch.bfloat16))
    launches += record(torch.float32, AttentionShape(4, 2, 64, 0.1), None)
    launches += record_layers(torch.bfloat16) + record_layers(torch.float32)
    for kernel, args, options in launches:
        compiled = compile_launch(kernel, args, options, target)
        shared = compiled.metadata.shared
        if shared > MAX_SHARED_BYTES:
            sys.exit(f"{kernel.__name__} takes {shared} bytes of shared memory with {options}")
        print(kernel.__name__, shared)


if __name__ == "__main__":
    main()
