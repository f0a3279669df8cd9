"""From token ids to vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from powerband.engine.linear.base import parameter


class Embedding(nn.Module):
    """Rows of `weight` [vocab, hidden], times `scale` rounded to the model's type (Gemma)."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, scale: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = parameter(vocab_size, hidden_size, dtype=dtype, device=device)
        self.scale = torch.tensor(scale, dtype=dtype).item()
        self._hidden_size = hidden_size
        self._panels: torch.Tensor | None = None  # a tied head's, with two neighbours of a row in each int32

    def share(self, packed: torch.Tensor) -> None:
        """Read rows out of the packed weight of a tied head (linear/bf16.py), and let the own copy go."""
        self._panels = packed.view(torch.int32).squeeze(-1)
        self.weight = parameter(0, dtype=self.weight.dtype, device=self.weight.device)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        vectors = (
            F.embedding(token_ids, self.weight) if self._panels is None else self._unpacked(self._panels, token_ids)
        )
        return vectors * self.scale if self.scale != 1.0 else vectors

    def _unpacked(self, panels: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """panels [vocab / 16, hidden / 2, 16]: row r lies in panel r // 16, column r % 16."""
        width = panels.shape[-1]
        rows = panels[token_ids // width, :, token_ids % width]
        return rows.view(self.weight.dtype)[:, : self._hidden_size].contiguous()
