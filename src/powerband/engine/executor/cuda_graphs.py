"""CUDA graphs for steps of decodes: the whole decoder as one launch, so that a small batch is not bound by the CPU.

A graph replays fixed kernels on fixed addresses. So one is captured per size of batch, steps are padded to the next
size, and their inputs are put into buffers that all graphs share:

    step     | r0 r1 r2 |                 inputs of 3 rows
    buffers  | r0 r1 r2 -- | ..........   the graph for 4 rows reads 4; "--": no context, writes no KV, gives zeros
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from powerband.engine.attention.base import AttentionBackend, AttentionBatch
from powerband.engine.executor.batch import Inputs
from powerband.engine.models.decoder import Decoder

# Captures a function and returns what runs it again.
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]

MAX_ROWS = 512
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, MAX_ROWS)


def can_capture(attention: str) -> bool:
    """Whether decodes are the same kernels in every step. The reference backend's are not: it plans on the host."""
    return attention == "triton"


@dataclass(frozen=True, slots=True)
class _Graph:
    """The decoder at one size of batch: run it, and find the hidden states [size, hidden] in `hidden`."""

    replay: Callable[[], None]
    hidden: torch.Tensor


class DecodeGraphs:
    """Runs a model's forward pass, by a graph where the step has only decodes, directly otherwise.

    max_rows: the largest batch to capture for. Not shared between threads. The result of a call holds until the next.
    """

    def __init__(
        self,
        model: Decoder,
        attention: AttentionBackend,
        *,
        max_rows: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        groups: int = 1,
        capture: Capture | None = None,
    ) -> None:
        self._model = model
        self._attention = attention
        self._capture = capture or _Capturer(device)
        self.sizes = [size for size in _SIZES if size < max_rows] + [max_rows]
        self._max_model_len = max_model_len
        by_length = model.spec.length_rope is not None
        width = -(-max_model_len // block_size)
        self._inputs = _static_inputs(max_rows, width, device, by_length=by_length, groups=groups)
        self._graphs: dict[int, _Graph] = {}

    @torch.inference_mode()
    def capture(self, progress: Callable[[float], None] = lambda _fraction: None) -> None:
        """Capture every size, the largest first, so that the smaller ones fit into its memory."""
        for done, size in enumerate(reversed(self.sizes)):
            progress(done / len(self.sizes))
            self._graphs[size] = self._captured(size)

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """Hidden states [tokens, hidden] before the last norm."""
        num_rows = len(inputs.batch.context_lens_host)
        # A graph has no adapters: which ones a step needs, and for how many rows each, is never twice the same.
        if inputs.batch.num_decodes < num_rows or num_rows > self.sizes[-1] or self._model.adapters.groups:
            return self._forward(inputs)
        size = self.sizes[bisect_left(self.sizes, num_rows)]
        graph = self._graphs.get(size)
        if graph is None:
            graph = self._graphs[size] = self._captured(size)
        self._stage(inputs, num_rows, size)
        graph.replay()
        return graph.hidden[:num_rows]

    def _captured(self, size: int) -> _Graph:
        inputs = _first_rows(self._inputs, size, self._max_model_len)
        # Padding only: whatever runs now, the KV cache stays as it is.
        for batch in (inputs.batch, *inputs.batch.others):
            batch.slots.fill_(-1)
        inputs.batch.context_lens.zero_()
        replay, hidden = self._capture(lambda: self._forward(inputs))
        return _Graph(replay, hidden)

    def _forward(self, inputs: Inputs) -> torch.Tensor:
        hidden: torch.Tensor = self._model(
            inputs.token_ids, inputs.positions, inputs.batch, self._attention, inputs.rope_lengths
        )
        return hidden

    def _stage(self, inputs: Inputs, num_rows: int, size: int) -> None:
        from powerband.engine.kernels.stage_decodes import stage_decodes_kernel  # Triton is there only with a GPU

        if inputs.rope_lengths is not None and self._inputs.rope_lengths is not None:
            self._inputs.rope_lengths[:num_rows].copy_(inputs.rope_lengths)
        # What all groups of layers share is copied with each of them: a few numbers, and there are few groups.
        for group in range(1 + len(inputs.batch.others)):
            source, target = inputs.batch.of_group(group), self._inputs.batch.of_group(group)
            stage_decodes_kernel[(size,)](
                inputs.token_ids,
                inputs.positions,
                source.slots,
                source.context_lens,
                source.block_tables,
                self._inputs.token_ids,
                self._inputs.positions,
                target.slots,
                target.context_lens,
                target.block_tables,
                num_rows,
                source.block_tables.shape[1],
                source.block_tables.stride(0),
                target.block_tables.stride(0),
                TILE=128,
                num_warps=1,
            )


class _Capturer:
    """Captures on a GPU. All graphs share one pool of memory, since only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        # The first run compiles kernels and sets up libraries, which must not happen while capturing.
        stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's is untyped
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = function()
        return graph.replay, result


def _static_inputs(rows: int, width: int, device: torch.device, *, by_length: bool, groups: int) -> Inputs:
    def ints(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    batch = AttentionBatch(
        query_starts=torch.arange(rows + 1, dtype=torch.int32, device=device),
        context_lens=ints(rows, dtype=torch.int32),
        block_tables=ints(rows, width, dtype=torch.int32),
        slots=ints(rows, dtype=torch.int64),
        num_decodes=rows,
        query_starts_host=list(range(rows + 1)),
        context_lens_host=[0] * rows,
    )
    batch.others = tuple(
        replace(batch, block_tables=ints(rows, width, dtype=torch.int32), slots=ints(rows, dtype=torch.int64))
        for _ in range(1, groups)
    )
    lengths = ints(rows, dtype=torch.int64) if by_length else None
    return Inputs(ints(rows, dtype=torch.int64), ints(rows, dtype=torch.int64), batch, lengths)


def _first_rows(inputs: Inputs, rows: int, max_model_len: int) -> Inputs:
    """Views of the first rows. On the host they claim the longest context: the graph must do for all."""

    def first(batch: AttentionBatch) -> AttentionBatch:
        return replace(
            batch,
            query_starts=batch.query_starts[: rows + 1],
            context_lens=batch.context_lens[:rows],
            block_tables=batch.block_tables[:rows],
            slots=batch.slots[:rows],
            num_decodes=rows,
            query_starts_host=list(range(rows + 1)),
            context_lens_host=[max_model_len] * rows,
            others=tuple(first(other) for other in batch.others),
        )

    batch = first(inputs.batch)
    lengths = inputs.rope_lengths[:rows] if inputs.rope_lengths is not None else None
    return Inputs(inputs.token_ids[:rows], inputs.positions[:rows], batch, lengths)
