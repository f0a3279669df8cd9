"""Carries out steps on one device: keeps each request's state, runs the decoder, samples. No scheduling here."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from powerband.core.loop import error_info
from powerband.core.params import SamplingParams
from powerband.core.step import ErrorInfo, Step, StepResult, TokenLogprobs, Work
from powerband.engine.attention.base import AttentionBackend
from powerband.engine.batch import InputBuffers, RequestState, Row
from powerband.engine.models.decoder import Decoder
from powerband.errors import InvalidRequest, PowerbandError

logger = logging.getLogger(__name__)


class Sampled(Protocol):
    """What a sampler returns for the rows of one step."""

    token_ids: torch.Tensor  # int64 [rows], on the device
    logprobs: list[TokenLogprobs | None]


class TokenSampler(Protocol):
    def new_state(
        self, request_id: str, params: SamplingParams, token_ids: list[int], num_prompt_tokens: int
    ) -> Any: ...

    def sample(self, logits: torch.Tensor, states: list[Any], positions: list[int]) -> Sampled: ...


@dataclass(slots=True)
class _Part:
    """Rows that went through one forward pass, and what came out of it for those that sample."""

    rows: list[Row]
    sampled: Sampled
    host_ids: torch.Tensor  # `sampled.token_ids`, on its way to the host
    finite: torch.Tensor  # bool [rows], likewise
    copied: torch.cuda.Event | None


@dataclass(slots=True)
class PendingStep:
    """A step whose work has been given to the device. `result` waits for it."""

    parts: list[_Part] = field(default_factory=list)
    failed: dict[str, ErrorInfo] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    outcome: StepResult | None = None

    def result(self) -> StepResult:
        if self.outcome is None:
            outcome = StepResult({}, {}, self.prompt_logprobs, self.failed)
            for part in self.parts:
                _collect(part, outcome)
            self.outcome = outcome
            self.parts = []
        return self.outcome


def _collect(part: _Part, outcome: StepResult) -> None:
    if part.copied is not None:
        part.copied.synchronize()
    logprobs = part.sampled.logprobs
    finite: list[bool] = part.finite.tolist()
    for index, (row, token) in enumerate(zip(part.rows, part.host_ids.tolist(), strict=True)):
        state = row.state
        if not finite[index]:
            outcome.failed[state.id] = error_info(_not_finite(row.work))
            continue
        outcome.tokens[state.id] = [token]
        if (entry := logprobs[index] if logprobs else None) is not None:
            outcome.logprobs[state.id] = [entry]
        state.tokens.append(token)
        state.sampling.append(token)
        if state.pending is not None and state.pending[0] is part.sampled.token_ids:
            state.pending = None


class ModelRunner:
    """Runs steps in the order they come. `launch` returns before a GPU has finished; on a CPU it computes at once."""

    def __init__(
        self,
        model: Decoder,
        attention: AttentionBackend,
        sampler: TokenSampler,
        *,
        block_size: int,
        device: torch.device,
    ) -> None:
        self.model = model
        self.attention = attention
        self.sampler = sampler
        self.device = device
        self._inputs = InputBuffers(block_size, device)
        self._states: dict[str, RequestState] = {}
        self._last: PendingStep | None = None

    @torch.inference_mode()
    def launch(self, step: Step) -> PendingStep:
        for id in step.dropped:
            self._states.pop(id, None)
        pending = PendingStep()
        rows = []
        for work in step.works:
            try:
                rows.append(Row(work, self._state(work)))
            except PowerbandError as error:
                self._states.pop(work.id, None)
                pending.failed[work.id] = error_info(error)
        rows.sort(key=lambda row: row.work.num_tokens != 1)  # decodes first
        if any(row.state.pending is not None and row.state.sampling.needs_history for row in rows) and self._last:
            self._last.result()
        if rows:
            self._run_isolated(rows, pending)
        self._last = pending
        return pending

    def _state(self, work: Work) -> RequestState:
        """The state of the work's request, brought up to date. Raises InvalidRequest for what cannot be computed."""
        if work.new is not None:
            vocab_size = self.model.spec.vocab_size
            if max(work.new.token_ids) >= vocab_size or min(work.new.token_ids) < 0:
                raise InvalidRequest(
                    f"The prompt has a token id outside the vocabulary (0 to {vocab_size - 1}).", param="prompt"
                )
            tokens = list(work.new.token_ids)
            sampling = self.sampler.new_state(work.id, work.new.params, tokens, work.new.num_prompt_tokens)
            state = RequestState(work.id, work.epoch, work.new.params, tokens, work.new.num_prompt_tokens, sampling)
            self._states[work.id] = state
        state = self._states[work.id]
        state.append_blocks(work.new_blocks)
        return state

    def _run_isolated(self, rows: list[Row], pending: PendingStep) -> None:
        """Run all rows at once; should that fail, one by one, so that only those at fault fail."""
        try:
            self._run(rows, pending)
        except torch.AcceleratorError:
            raise  # the device is in doubt: nothing that follows could be trusted
        except Exception as error:
            if len(rows) > 1:
                logger.warning("A step of %d requests failed (%s); running them one by one.", len(rows), error)
                for row in rows:
                    self._run_isolated([row], pending)
            else:
                logger.exception("Request %s failed.", rows[0].state.id)
                pending.failed[rows[0].state.id] = error_info(error)

    def _run(self, rows: list[Row], pending: PendingStep) -> None:
        inputs = self._inputs.build(rows)
        self._fill_pending(rows, inputs.token_ids, inputs.batch.query_starts_host)
        hidden = self.model(inputs.token_ids, inputs.positions, inputs.batch, self.attention)
        starts = inputs.batch.query_starts_host
        sampling = [index for index, row in enumerate(rows) if row.work.samples]
        if sampling:
            last = [starts[index + 1] - 1 for index in sampling]
            if len(last) < hidden.shape[0]:
                hidden = hidden[torch.tensor(last, device=self.device)]
            pending.parts.append(self._sample([rows[index] for index in sampling], self.model.logits(hidden)))

    def _fill_pending(self, rows: list[Row], token_ids: torch.Tensor, starts: list[int]) -> None:
        """Input tokens that a step in flight samples: copied on the device, one gather per such step."""
        sources: dict[int, tuple[torch.Tensor, list[int], list[int]]] = {}
        for index, row in enumerate(rows):
            end = row.work.start + row.work.num_tokens
            if row.state.pending is not None and end > len(row.state.tokens):
                ids, source_row = row.state.pending
                _, targets, source_rows = sources.setdefault(id(ids), (ids, [], []))
                targets.append(starts[index + 1] - 1)
                source_rows.append(source_row)
        for ids, targets, source_rows in sources.values():
            where = torch.tensor(targets, device=self.device)
            token_ids[where] = ids[torch.tensor(source_rows, device=self.device)]

    def _sample(self, rows: list[Row], logits: torch.Tensor) -> _Part:
        finite = logits.sum(dim=-1, dtype=torch.float32).isfinite()
        on_gpu = self.device.type == "cuda"
        if on_gpu or not finite.all():
            logits = logits.masked_fill(~finite.unsqueeze(-1), 0.0)
        positions = [row.work.start + row.work.num_tokens for row in rows]
        sampled = self.sampler.sample(logits, [row.state.sampling for row in rows], positions)
        copied = None
        host_ids = sampled.token_ids
        if on_gpu:
            host_ids = torch.empty(host_ids.shape, dtype=host_ids.dtype, pin_memory=True)
            host_ids.copy_(sampled.token_ids, non_blocking=True)
            finite = finite.to("cpu", non_blocking=True)
            copied = torch.cuda.current_stream(self.device).record_event()
        for index, row in enumerate(rows):
            row.state.pending = (sampled.token_ids, index)
        return _Part(rows, sampled, host_ids, finite, copied)


def _not_finite(work: Work) -> PowerbandError:
    return PowerbandError(
        f"The model's output for position {work.start + work.num_tokens} is not a number.",
        hint="The checkpoint may be damaged, or its values overflow this dtype: try dtype=bfloat16 or float32.",
        code="not_finite",
    )
