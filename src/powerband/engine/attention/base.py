"""The interface behind which attention is computed. A backend owns the layout of its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(slots=True)
class AttentionBatch:
    """Where a step's tokens lie. Built once per step, shared by all layers. Rows are requests, decodes first.

    tokens   | r0 | r1 | r2 r2 r2 | r3 r3 |      query_starts = [0, 1, 2, 5, 7], num_decodes = 2

    With sliding windows, layers are in groups (spec.kv_layout), each with slots and tables of its own. Blocks that lie
    before a layer's window are not its request's any more: what they hold must not show, not even a NaN.
    """

    query_starts: torch.Tensor  # int32 [rows + 1]
    context_lens: torch.Tensor  # int32 [rows]: positions whose KV exists after this step's writes
    block_tables: torch.Tensor  # int32 [rows, max_blocks]: padded with 0
    slots: torch.Tensor  # int64 [tokens]: block * block_size + offset where each token's K and V go
    num_decodes: int  # leading rows with exactly one token
    query_starts_host: list[int]
    context_lens_host: list[int]
    others: tuple[AttentionBatch, ...] = ()  # the same rows, as the second and further groups of layers have them

    def of_group(self, group: int) -> AttentionBatch:
        return self.others[group - 1] if group else self


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What stays the same for a layer over its life."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm over each head of q and k: weights [num_heads + num_kv_heads, head_dim]."""

    weights: torch.Tensor
    eps: float


class LayerPlaces:
    """Where the layers of a model have their cache: each its own, unless groups of layers share it."""

    def __init__(self, places: Sequence[tuple[int, int]] = ()) -> None:
        self._places = list(places)

    def find(self, layer: int) -> tuple[int, int]:
        """Of a layer: its group, and its place among the caches."""
        return self._places[layer] if self._places else (0, layer)


class AttentionBackend(Protocol):
    """Writes new K and V into blocks and attends over block tables, for any mix of prefill chunks and decodes."""

    name: str

    def allocate(
        self,
        num_layers: int,
        num_blocks: int,
        shape: AttentionShape,
        dtype: torch.dtype,
        places: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Take memory for the KV cache of `num_layers` layers, held in `dtype`.

        places: of each layer its group and its place in it, where layers of several groups share the memory of a place.
        """
        ...

    def begin(self, batch: AttentionBatch) -> None:
        """Once per step, before the layers: work out what all of them share."""
        ...

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: AttentionBatch,
        shape: AttentionShape,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write k, v [tokens, num_kv_heads, head_dim] to `batch.slots`, then attend causally.

        q: [tokens, num_heads, head_dim] → [tokens, num_heads, head_dim]. sinks: [num_heads] extra logits.
        """
        ...

    def attend_unrotated(
        self,
        layer: int,
        qkv: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        norm: HeadNorm | None,
        batch: AttentionBatch,
        shape: AttentionShape,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`attend` straight from the projection: norm of each head of q and k, then rotation, then `attend`.

        qkv: [tokens, num_heads + 2 * num_kv_heads, head_dim]. rotation: cos and (signed) sin [tokens, 1, rotary_dim].
        """
        ...
