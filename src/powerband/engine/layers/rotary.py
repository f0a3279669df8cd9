"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): tables made once, q and k turned together."""

from __future__ import annotations

import torch

from powerband.spec.model.model_spec import RopeSpec
from powerband.spec.model.rope import rope_frequencies, rotary_rows


class RotaryTable:
    """cos and sin of every position that can occur. Layers of the same RopeSpec share one.

    A pair is (x[i], x[i + rotary_dim / 2]), as in Hugging Face checkpoints. `sin` carries the sign of the rotation:
    rotate(x) = x * cos + swap_halves(x) * sin.

    longrope keeps two tables, one behind the other: short factors, for positions up to the original length, and long
    ones. dynamic has other frequencies for every length, so that nothing is kept.
    """

    def __init__(self, rope: RopeSpec, max_positions: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.rotary_dim = rope.rotary_dim
        self._rope = rope
        self._dtype = dtype
        rows = rotary_rows(rope, max_positions)
        self._num_short = rows - max_positions if rows else 0
        parts = [(self._num_short, self._num_short), (max_positions, max_positions)] if rows else []
        angles = [
            torch.outer(torch.arange(count, dtype=torch.float32), torch.tensor(rope_frequencies(rope, length)))
            for count, length in parts
        ]
        if angles:
            self.cos, self.sin = self._both(torch.cat(angles).to(device))

    def at(self, positions: torch.Tensor, lengths: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [tokens, 1, rotary_dim] for positions [tokens]; once per step.

        lengths [tokens]: see `rope_length`; None: of sequences that end at each position.
        """
        if self._rope.scaling == "dynamic":
            cos, sin = self._both(self._dynamic_angles(positions, lengths))
            return cos.unsqueeze(1), sin.unsqueeze(1)
        if self._num_short:
            ends = positions + 1 if lengths is None else torch.maximum(lengths, positions + 1)
            positions = positions + self._num_short * (ends > self._num_short)
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)

    def _dynamic_angles(self, positions: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """[tokens, rotary_dim / 2], computed in float32 as transformers does: `rope_frequencies` of many lengths."""
        rope, dim = self._rope, self.rotary_dim
        ends = positions + 1 if lengths is None else torch.maximum(lengths, positions + 1)
        stretch = ends.clamp(min=rope.original_max_position).float() / rope.original_max_position
        theta = rope.theta * (rope.factor * stretch - (rope.factor - 1)) ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, device=positions.device).float() / dim
        return positions.float().unsqueeze(1) / theta.unsqueeze(1) ** exponents

    def _both(self, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        factor = self._rope.attention_factor
        cos, sin = angles.cos() * factor, angles.sin() * factor
        return torch.cat([cos, cos], dim=-1).to(self._dtype), torch.cat([-sin, sin], dim=-1).to(self._dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, head_dim] with its leading rotary_dim dimensions rotated."""
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        return torch.cat([rotate(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]], dim=-1)
    return torch.addcmul(x * cos, torch.roll(x, rotary_dim // 2, dims=-1), sin)
