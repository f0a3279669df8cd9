"""Encoders such as BERT: every token of a text sees all others, so that a text is computed at once and nothing is kept.

x = norm(word + position + type)        each layer: x = norm(x + attention(x)); x = norm(x + mlp(x))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from powerband.engine.attention.base import AttentionBatch
from powerband.engine.layers.embedding import Embedding
from powerband.engine.linear.base import Linear, parameter
from powerband.spec.model.model_spec import EncoderSpec, ModelSpec

# Texts whose lengths differ by no more than this share of the longest, and a few tokens, are padded to it.
_PADDED_SHARE, _PADDED_TOKENS = 0.25, 8


@dataclass(frozen=True, slots=True)
class TextGroup:
    """Texts of similar length, for one attention: where their tokens lie [texts, length], and which are padding."""

    rows: torch.Tensor  # int64 [texts * length]: of the step's tokens; padding repeats a text's first
    num_texts: int
    mask: torch.Tensor | None  # bool [texts, 1, 1, length]; None: no padding


class LayerNorm(nn.Module):
    """(x - mean) / deviation * weight + bias over the last dimension."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = parameter(size, dtype=dtype, device=device)
        self.bias = parameter(size, dtype=dtype, device=device)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Encoder(nn.Module):
    """All layers. `head` is None: nothing is generated."""

    head = None

    def __init__(self, spec: ModelSpec, own: EncoderSpec, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        size = spec.hidden_size
        self.spec = spec
        self._offset = own.position_offset
        self._last_type = own.num_types - 1  # RoBERTa has one type
        self.embedding = Embedding(spec.vocab_size, size, scale=1.0, dtype=dtype, device=device)
        self.positions = Embedding(own.num_positions, size, scale=1.0, dtype=dtype, device=device)
        self.types = Embedding(own.num_types, size, scale=1.0, dtype=dtype, device=device)
        self.embedding_norm = LayerNorm(size, spec.norm_eps, dtype=dtype, device=device)
        self.layers = nn.ModuleList(EncoderLayer(spec, dtype, device) for _ in spec.layers)
        self.norm = nn.Identity()  # what a decoder's last norm is: here every layer ends with one

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, types: torch.Tensor
    ) -> torch.Tensor:
        """token_ids, positions, types [tokens] of whole texts → hidden states [tokens, hidden]."""
        x: torch.Tensor = self.embedding(token_ids) + self.positions(positions + self._offset)
        x = self.embedding_norm(x + self.types(types.clamp(max=self._last_type)))
        groups = _groups(batch.query_starts_host, x.device)
        for layer in self.every_layer():
            x = layer(x, groups)
        return x

    def every_layer(self) -> Iterator[EncoderLayer]:
        yield from cast("Iterator[EncoderLayer]", iter(self.layers))


class EncoderLayer(nn.Module):
    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        size, inner = spec.hidden_size, spec.intermediate_size
        self.num_heads, self.head_dim = spec.num_heads, spec.head_dim
        self._approximate = "tanh" if spec.activation == "gelu_tanh" else "none"
        self.qkv = Linear(size, 3 * size, bias=True, dtype=dtype, device=device)
        self.output = Linear(size, size, bias=True, dtype=dtype, device=device)
        self.attention_norm = LayerNorm(size, spec.norm_eps, dtype=dtype, device=device)
        self.up = Linear(size, inner, bias=True, dtype=dtype, device=device)
        self.down = Linear(inner, size, bias=True, dtype=dtype, device=device)
        self.mlp_norm = LayerNorm(size, spec.norm_eps, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor, groups: list[TextGroup]) -> torch.Tensor:
        attended = self._attend(self.qkv(x), groups)
        self.output.add_to(x, attended)
        x = self.attention_norm(x)
        inner = F.gelu(self.up(x), approximate=self._approximate)
        self.down.add_to(x, inner)
        normed: torch.Tensor = self.mlp_norm(x)
        return normed

    def _attend(self, qkv: torch.Tensor, groups: list[TextGroup]) -> torch.Tensor:
        """[tokens, 3 * hidden] → [tokens, hidden]."""
        heads, dim = self.num_heads, self.head_dim
        out = qkv.new_empty(len(qkv), heads * dim)
        for group in groups:
            padded = qkv[group.rows].view(group.num_texts, -1, 3, heads, dim)
            q, k, v = padded.permute(2, 0, 3, 1, 4)  # each [texts, heads, length, dim]
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask)
            flat = attended.transpose(1, 2).reshape(-1, heads * dim)
            if group.mask is None:
                out[group.rows] = flat
            else:
                keep = group.mask.flatten()
                out[group.rows[keep]] = flat[keep]
        return out


def _groups(starts: list[int], device: torch.device) -> list[TextGroup]:
    """The texts of a step by length, the longer ones first."""
    lengths = [end - start for start, end in pairwise(starts)]
    groups: list[list[int]] = []
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        limit = lengths[groups[-1][0]] if groups else 0
        if groups and lengths[text] >= limit * (1 - _PADDED_SHARE) - _PADDED_TOKENS:
            groups[-1].append(text)
        else:
            groups.append([text])
    return [_group([(starts[text], lengths[text]) for text in texts], device) for texts in groups]


def _group(texts: list[tuple[int, int]], device: torch.device) -> TextGroup:
    """texts: (first token, length) of each, the longest first."""
    first = torch.tensor([start for start, _ in texts], device=device).unsqueeze(1)
    counts = torch.tensor([length for _, length in texts], device=device).unsqueeze(1)
    position = torch.arange(texts[0][1], device=device).unsqueeze(0)
    is_real = position < counts
    rows = (first + torch.where(is_real, position, 0)).flatten()
    is_padded = texts[-1][1] < texts[0][1]
    return TextGroup(rows, len(texts), is_real[:, None, None, :] if is_padded else None)
