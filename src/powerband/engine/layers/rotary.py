"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): tables made once, q and k turned together."""

from __future__ import annotations

import torch

from powerband.spec.model import RopeSpec
from powerband.spec.rope import rope_frequencies


class RotaryTable:
    """cos and sin of every position that can occur. Layers of the same RopeSpec share one.

    A pair is (x[i], x[i + rotary_dim / 2]), as in Hugging Face checkpoints. `sin` carries the sign of the rotation:
    rotate(x) = x * cos + swap_halves(x) * sin.
    """

    def __init__(self, rope: RopeSpec, max_positions: int, *, dtype: torch.dtype, device: torch.device) -> None:
        frequencies = torch.tensor(rope_frequencies(rope, max_positions), dtype=torch.float32)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
        cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
        self.rotary_dim = rope.rotary_dim
        self.cos = torch.cat([cos, cos], dim=-1).to(device=device, dtype=dtype)
        self.sin = torch.cat([-sin, sin], dim=-1).to(device=device, dtype=dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [tokens, 1, rotary_dim] for positions [tokens]; once per step."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, head_dim] with its leading rotary_dim dimensions rotated."""
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        return torch.cat([rotate(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]], dim=-1)
    return torch.addcmul(x * cos, torch.roll(x, rotary_dim // 2, dims=-1), sin)
