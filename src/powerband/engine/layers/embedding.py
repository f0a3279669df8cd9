"""From token ids to vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from powerband.engine.layers.linear import parameter


class Embedding(nn.Module):
    """Rows of `weight` [vocab, hidden], times `scale` rounded to the model's type (Gemma)."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, scale: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = parameter(vocab_size, hidden_size, dtype=dtype, device=device)
        self.scale = torch.tensor(scale, dtype=dtype).item()

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        vectors = F.embedding(token_ids, self.weight)
        return vectors * self.scale if self.scale != 1.0 else vectors
