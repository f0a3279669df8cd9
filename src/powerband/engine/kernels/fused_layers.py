"""Triton kernels for what lies between the matrix products: the norm, and the activation with its product.

Each reads and writes its data once, where plain operators do so two or three times; a small batch, whose time is the
number of kernels, gains as much. Computed in float32 and rounded once.
"""

# mypy: ignore-errors
# (Triton's language looks like Python, but its pointers and tensors have no Python types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

_GATED_TILE = 1024
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


@triton.jit
def rms_norm_kernel(x, out, weight, size, eps, stride_x, TILE: tl.constexpr):
    """One row: out = x / rms(x) * weight."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    inside = column < size
    values = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(values * values, axis=0) / size + eps)
    values = values * inverse_rms * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_kernel(gate_up, out, size, ACTIVATION: tl.constexpr, TILE: tl.constexpr):
    """A tile of a row of activation(gate) * up; gate_up [rows, 2 * size] has the gate first."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        active = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2 z)), with z = sqrt(2 / pi) (x + 0.044715 x^3)
        active = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + row * size + column, (active * up).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm of x [tokens, size]."""
    tokens, size = x.shape
    out = torch.empty((tokens, size), dtype=x.dtype, device=x.device)
    tile = triton.next_power_of_2(size)
    warps = min(max(tile // 512, 1), 16)
    rms_norm_kernel[(tokens,)](x, out, weight, size, eps, x.stride(0), TILE=tile, num_warps=warps)
    return out


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(first half) * second half: contiguous [tokens, 2 * size] → [tokens, size]."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    gated_kernel[(tokens, triton.cdiv(size, _GATED_TILE))](
        gate_up, out, size, ACTIVATION=activation, TILE=_GATED_TILE, num_warps=4
    )
    return out
