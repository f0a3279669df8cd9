"""What LoRA adapters (Hu et al. 2021, arXiv 2106.09685) add to a projection: x @ A.T @ B.T * scale, for their rows.

A step's rows are sorted so that those of one adapter lie together; the rest of the batch is left as it is:

    rows    | none none | a a a | b b |          groups = [(a, 2, 5), (b, 5, 7)]

A projection that is several in the checkpoint (q, k and v) is multiplied with all their A at once; each has its own B:

    inner = x @ [A_q; A_k; A_v].T          out[:, q's rows] += inner[:, q's ranks] @ B_q.T          and so on
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Piece:
    """One target's B, times the scale: b [out, rank], added to the outputs from `start` on."""

    b: torch.Tensor
    start: int
    first_rank: int  # its ranks among those of `AdapterDelta.a`


@dataclass(frozen=True, slots=True)
class AdapterDelta:
    """What one adapter adds to one projection. a [ranks of all pieces, in]."""

    a: torch.Tensor
    pieces: tuple[Piece, ...]

    def add_to(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """out [tokens, out] += delta of x [tokens, in], in place."""
        inner = x @ self.a.t()
        for piece in self.pieces:
            size, rank = piece.b.shape
            ranks = inner[:, piece.first_rank : piece.first_rank + rank]
            out[:, piece.start : piece.start + size].addmm_(ranks, piece.b.t())

    @property
    def memory_bytes(self) -> int:
        return self.a.nbytes + sum(piece.b.nbytes for piece in self.pieces)


@dataclass(frozen=True, slots=True, eq=False)
class AdapterWeights:
    """An adapter in memory. digest: of its content, which is its identity. deltas: by the name of our projection."""

    digest: str
    rank: int  # the largest of its targets
    deltas: Mapping[str, AdapterDelta]

    @property
    def memory_bytes(self) -> int:
        return sum(delta.memory_bytes for delta in self.deltas.values())


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """An adapter and the tokens [start, end) of a step that belong to its requests."""

    weights: AdapterWeights
    start: int
    end: int


class ActiveAdapters:
    """The adapters of the forward pass that runs. One for a model; its projections look here."""

    def __init__(self) -> None:
        self.groups: list[AdapterRows] = []

    def add_to(self, name: str, out: torch.Tensor, x: torch.Tensor) -> None:
        """out [tokens, out] += what each token's adapter adds to the projection `name` of x [tokens, in], in place."""
        for group in self.groups:
            delta = group.weights.deltas.get(name)
            if delta is not None:
                delta.add_to(out[group.start : group.end], x[group.start : group.end])
