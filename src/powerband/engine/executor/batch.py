"""From the works of a step to the tensors of a forward pass, in host buffers that are reused from step to step."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLMatcher

from powerband.core.params import SamplingParams
from powerband.core.step import Work
from powerband.engine.attention.base import AttentionBatch
from powerband.engine.linear.adapters import AdapterWeights
from powerband.engine.pooling.pooler import PoolingState
from powerband.engine.sampling.logits import SamplingState

Int32s = npt.NDArray[np.int32]


@dataclass(slots=True)
class RequestState:
    """What the runner keeps of a request between steps."""

    id: str
    params: SamplingParams
    tokens: list[int]  # prompt and every sampled token whose value is known here
    num_prompt_tokens: int
    sampling: SamplingState
    rope_length: int = 0
    adapter: AdapterWeights | None = None
    pooling: PoolingState | None = None  # its prompt is pooled, and nothing sampled
    blocks: Int32s = field(default_factory=lambda: np.zeros(8, np.int32))  # grows by doubling
    num_blocks: int = 0
    # The token after `tokens`, sampled by a step in flight: (its sampled ids on the device, row).
    pending: tuple[torch.Tensor, int] | None = None
    matcher: LLMatcher | None = None  # of its grammar; it has consumed the output in `tokens`

    def append_blocks(self, new: list[int]) -> None:
        """Pages, where layers are in groups: those of a block together. Before a window there may be none (-1)."""
        if not new:
            return
        needed = self.num_blocks + len(new)
        if needed > len(self.blocks):
            grown = np.zeros(max(needed, 2 * len(self.blocks)), np.int32)
            grown[: self.num_blocks] = self.blocks[: self.num_blocks]
            self.blocks = grown
        np.maximum(new, 0, out=self.blocks[self.num_blocks : needed], casting="unsafe")
        self.num_blocks = needed


@dataclass(frozen=True, slots=True)
class Row:
    """One request's part of a forward pass."""

    work: Work
    state: RequestState

    @property
    def order(self) -> tuple[bool, str]:
        """Decodes come first, and among these and the others the rows of one adapter together."""
        return self.work.num_tokens != 1, self.state.adapter.digest if self.state.adapter is not None else ""


@dataclass(frozen=True, slots=True)
class Inputs:
    token_ids: torch.Tensor  # int64 [tokens]
    positions: torch.Tensor  # int64 [tokens]
    batch: AttentionBatch
    rope_lengths: torch.Tensor | None = None  # int64 [tokens]: of models whose rotation depends on a sequence's length
    types: torch.Tensor | None = None  # int64 [tokens]: of encoders, 1 in the second text of a pair


class InputBuffers:
    """Builds inputs. `num_sets` steps may be in flight before a buffer is written again, without waiting for it.

    On a GPU the buffers are pinned and copied without waiting. by_length: the model's rotation depends on the length
    of a sequence. with_types: for models that have token types. groups: of layers with block tables of their own.
    """

    def __init__(
        self,
        block_size: int,
        device: torch.device,
        *,
        by_length: bool = False,
        with_types: bool = False,
        groups: int = 1,
        num_sets: int = 2,
    ) -> None:
        self.block_size = block_size
        self.groups = groups
        self.by_length = by_length
        self.with_types = with_types
        self.device = device
        self._sets = [_Buffers(device.type == "cuda") for _ in range(num_sets)]
        self._next = 0

    def build(self, rows: Sequence[Row]) -> Inputs:
        """rows: those with one token first."""
        buffers = self._sets[self._next]
        self._next = (self._next + 1) % len(self._sets)
        buffers.wait_for_copies()
        counts = [row.work.num_tokens for row in rows]
        ends = [row.work.start + row.work.num_tokens for row in rows]
        num_tokens, width = sum(counts), max(row.state.num_blocks for row in rows) // self.groups
        tokens = buffers.tokens(num_tokens, self.groups)
        per_row = buffers.rows(len(rows))
        tables = buffers.tables(self.groups, len(rows), width)
        _fill_tokens(tokens, rows)
        for index, row in enumerate(rows):
            blocks = row.state.blocks[: row.state.num_blocks].reshape(-1, self.groups)
            tables.array[:, index, : len(blocks)] = blocks.T
            tables.array[:, index, len(blocks) :] = 0
        positions = tokens.array[1]
        owner = np.repeat(np.arange(len(rows)), counts)
        slots = tables.array[:, owner, positions // self.block_size].astype(np.int64)
        tokens.array[4:] = slots * self.block_size + positions % self.block_size
        tokens.array[2] = np.repeat([row.state.rope_length for row in rows], counts)
        if self.with_types:
            tokens.array[3] = positions >= np.repeat([_second_text_start(row.state) for row in rows], counts)
        starts = per_row.array[0]
        starts[0] = 0
        np.cumsum(counts, out=starts[1:])
        per_row.array[1, 1:] = ends
        on_device, rows_on_device = tokens.to(self.device), per_row.to(self.device)
        tables_on_device = tables.to(self.device)
        batch = AttentionBatch(
            query_starts=rows_on_device[0],
            context_lens=rows_on_device[1, 1:],
            block_tables=tables_on_device[0],
            slots=on_device[4],
            num_decodes=sum(count == 1 for count in counts),
            query_starts_host=starts.tolist(),
            context_lens_host=ends,
        )
        batch.others = tuple(
            replace(batch, block_tables=tables_on_device[group], slots=on_device[4 + group])
            for group in range(1, self.groups)
        )
        buffers.note_copies(self.device)
        lengths = on_device[2] if self.by_length else None
        return Inputs(on_device[0], on_device[1], batch, lengths, on_device[3] if self.with_types else None)


def _second_text_start(state: RequestState) -> int:
    start = state.pooling.params.second_text_start if state.pooling is not None else None
    return sys.maxsize if start is None else start


def _fill_tokens(tokens: _Staged, rows: Sequence[Row]) -> None:
    """Token ids and positions. A token that only the device knows is written there later."""
    ids: list[int] = []
    positions: list[int] = []
    for row in rows:
        start, end = row.work.start, row.work.start + row.work.num_tokens
        known = row.state.tokens[start:end]
        ids += known
        if len(known) < end - start:
            ids.append(0)
        positions += range(start, end)
    tokens.array[0] = ids
    tokens.array[1] = positions


@dataclass(frozen=True, slots=True)
class _Staged:
    """A host tensor and the numpy view of the same memory."""

    tensor: torch.Tensor
    array: npt.NDArray[Any]

    def to(self, device: torch.device) -> torch.Tensor:
        return self.tensor if device.type == "cpu" else self.tensor.to(device, non_blocking=True)


class _Buffers:
    """Host memory of one step. It grows to the largest step seen and stays."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = {torch.int64: self._new(0, torch.int64), torch.int32: self._new(0, torch.int32)}
        self._tables = self._new(0, torch.int32)
        self._copied: torch.cuda.Event | None = None

    def note_copies(self, device: torch.device) -> None:
        """What has been copied from here so far must have arrived before the memory is written again."""
        if device.type == "cuda":
            self._copied = torch.cuda.current_stream(device).record_event()

    def wait_for_copies(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def tokens(self, count: int, groups: int) -> _Staged:
        """[ids, positions, rope lengths, types, and slots of each group] x tokens."""
        return self._shaped(torch.int64, 4 + groups, count)

    def rows(self, count: int) -> _Staged:
        """[query starts, (unused, then context lengths)] x (rows + 1)."""
        return self._shaped(torch.int32, 2, count + 1)

    def tables(self, groups: int, rows: int, width: int) -> _Staged:
        size = groups * rows * width
        if self._tables.numel() < size:
            self._tables = self._new(2 * size, torch.int32)
        tensor = self._tables[:size].view(groups, rows, width)
        return _Staged(tensor, tensor.numpy())

    def _shaped(self, dtype: torch.dtype, rows: int, count: int) -> _Staged:
        if self._memory[dtype].numel() < rows * count:
            self._memory[dtype] = self._new(2 * rows * count, dtype)
        tensor = self._memory[dtype][: rows * count].view(rows, count)
        return _Staged(tensor, tensor.numpy())

    def _new(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=self._pinned)
