"""What LoRA adapters (Hu et al. 2021, arXiv 2106.09685) add to a projection: x @ A.T @ B.T * scale, for their rows.

A step's rows are sorted so that those of one adapter lie together; the rest of the batch is left as it is:

    rows    | none none | a a a | b b |          groups = [(a, 2, 5), (b, 5, 7)]

A projection that is several in the checkpoint (q, k and v) is multiplied with all their A at once; each has its own B:

    inner = x @ [A_q; A_k; A_v].T          out[:, q's rows] += inner[:, q's ranks] @ B_q.T          and so on
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from powerband.engine.kernels.cpu import library

PANEL, STEP = 16, 32  # as in linear/bf16.py


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


class KernelDelta:
    """The same, packed for the C++ kernels (csrc/adapters.cpp), which compute all adapters of a step together."""

    def __init__(self, delta: AdapterDelta) -> None:
        """delta: one that they take."""
        pieces = delta.pieces
        parts = [delta.a[one.first_rank : one.first_rank + one.b.shape[1]] for one in pieces]
        packed_a = [_panels(part, delta.a.shape[1]) for part in parts]
        packed_b = [_panels(one.b, -(-one.b.shape[1] // _DEPTH_STEP) * _DEPTH_STEP) for one in pieces]
        self.memory_bytes = sum(tensor.nbytes for tensor in (*packed_a, *packed_b))
        self.number: int = torch.ops.powerband.adapter_delta(
            packed_a,
            packed_b,
            [one.b.shape[1] for one in pieces],
            [one.start for one in pieces],
            [one.b.shape[0] for one in pieces],
            delta.a.shape[1],
            max(one.start + one.b.shape[0] for one in pieces),
        )
        weakref.finalize(self, torch.ops.powerband.free_adapter_deltas, [self.number])

    @staticmethod
    def takes(delta: AdapterDelta) -> bool:
        """Whether the kernels exist here, and take its type and size."""
        is_right = delta.a.device.type == "cpu" and delta.a.dtype is torch.bfloat16 and delta.a.shape[1] % STEP == 0
        return is_right and library.load().tier is not None


_DEPTH_STEP = 4  # the kernels' ranks of B are padded to a multiple of this


def _panels(weight: torch.Tensor, depth: int) -> torch.Tensor:
    """weight [out, in] as in linear/bf16.py, but so many inputs deep."""
    panels = -(-weight.shape[0] // PANEL)
    padded = F.pad(weight, (0, depth - weight.shape[1], 0, panels * PANEL - weight.shape[0]))
    return padded.view(panels, PANEL, depth // 2, 2).permute(0, 2, 1, 3).contiguous()


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """An adapter in memory. digest: of its content, which is its identity. deltas: by the name of our projection."""

    digest: str
    rank: int  # the largest of its targets
    deltas: Mapping[str, AdapterDelta | KernelDelta]

    @property
    def memory_bytes(self) -> int:
        return sum(delta.memory_bytes for delta in self.deltas.values())

    @functools.cached_property
    def is_packed(self) -> bool:
        """Whether the C++ kernels compute all of it."""
        return all(isinstance(delta, KernelDelta) for delta in self.deltas.values())


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
        if not self.groups:
            return
        if any(numbers := self.kernel_deltas(name)):
            starts, ends = self.bounds()
            torch.ops.powerband.add_adapter_deltas(numbers, starts, ends, x.contiguous(), out)
        for group in self.groups:
            delta = group.weights.deltas.get(name)
            if isinstance(delta, AdapterDelta):
                delta.add_to(out[group.start : group.end], x[group.start : group.end])

    def kernel_deltas(self, name: str) -> list[int]:
        """Of each group the number of its KernelDelta, 0 where it has none."""
        deltas = (group.weights.deltas.get(name) for group in self.groups)
        return [delta.number if isinstance(delta, KernelDelta) else 0 for delta in deltas]

    def bounds(self) -> tuple[list[int], list[int]]:
        """Where the tokens of each group begin and end."""
        return [group.start for group in self.groups], [group.end for group in self.groups]

    @property
    def need_projections(self) -> bool:
        """Whether something is to be added that operators which compute several projections cannot add."""
        return any(not group.weights.is_packed for group in self.groups)
