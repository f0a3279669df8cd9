"""Triton kernel for experts: many small products in one launch, each over the tokens that chose its expert.

    rows sorted by expert    | e0 e0 e0 | e1 | e3 e3 |        offsets = [0, 3, 4, 4, 6]
    tiles of TILE_M rows     | t0  | t1 | t2 |  t3  |         a tile never crosses from one expert to the next

Which experts have tokens is known on the device only. So the grid is an upper bound, and each program finds
its expert by bisection: nothing waits for the device, and a graph can be captured.
"""

# mypy: ignore-errors
# (Triton's language looks like Python, but its pointers and tensors have no Python types.)

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from powerband.engine.kernels.paged_attention import row_of


def grouped_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    order: torch.Tensor | None = None,
    per_token: int = 1,
) -> torch.Tensor:
    """Row r of expert e: x[r] @ weight[e].T + bias[e]. weight [experts, out, in]; offsets int32 [experts + 1].

    With `order`, row r is x[order[r] // per_token].
    """
    num_rows = x.shape[0] if order is None else order.shape[0]
    num_experts, size_out, size_in = weight.shape
    out = torch.empty((num_rows, size_out), dtype=x.dtype, device=x.device)
    tile_m = 16 if num_rows <= 16 * num_experts else 64
    upcast = x.dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1"
    grouped_matmul_kernel[(num_rows // tile_m + num_experts, triton.cdiv(size_out, 64))](
        *(x, weight, x if bias is None else bias, out, offsets, x if order is None else order),
        *(num_experts, size_out, size_in, x.stride(0)),
        PER_TOKEN=per_token,
        TILE_M=tile_m,
        TILE_N=64,
        TILE_K=32 if x.dtype == torch.float32 else 64,
        HAS_ORDER=order is not None,
        HAS_BIAS=bias is not None,
        UPCAST=upcast,
        num_warps=4,
        num_stages=2 if x.dtype == torch.float32 else 3,
    )
    return out


@triton.jit
def grouped_matmul_kernel(x, weight, bias, out, offsets, order, num_experts, size_out, size_in, stride_x,
                          PER_TOKEN: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
                          HAS_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """A tile of one expert's product. Grid: (tiles of rows over all experts, tiles of columns)."""
    program = tl.program_id(0)
    expert = row_of(program, offsets, 0, num_experts, TILE_M)
    begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    first = begin + (program - begin // TILE_M - expert) * TILE_M
    if first >= end:
        return
    row = first + tl.arange(0, TILE_M)
    column = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    exists, inside = row < end, column < size_out
    source = row.to(tl.int64)
    if HAS_ORDER:
        source = tl.load(order + row, mask=exists, other=0) // PER_TOKEN
    matrix = weight + expert.to(tl.int64) * size_out * size_in
    acc = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
    for start in range(0, size_in, TILE_K):
        k = start + tl.arange(0, TILE_K)
        a_at = x + source[:, None] * stride_x + k[None, :]
        a = tl.load(a_at, mask=exists[:, None] & (k < size_in)[None, :], other=0.0)
        b_at = matrix + column[:, None].to(tl.int64) * size_in + k[None, :]
        b = tl.load(b_at, mask=inside[:, None] & (k < size_in)[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc += tl.dot(a, tl.trans(b), input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + expert * size_out + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = out + row[:, None].to(tl.int64) * size_out + column[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=exists[:, None] & inside[None, :])
