"""Carries out steps on one device: keeps each request's state, runs the decoder, samples. No scheduling here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from llguidance import LLMatcher

from powerband.core.loop import error_info
from powerband.core.step import ErrorInfo, Step, StepResult, TokenLogprobs, Work
from powerband.engine.attention.base import AttentionBackend
from powerband.engine.executor.batch import InputBuffers, Inputs, RequestState, Row
from powerband.engine.executor.grammar_masks import GrammarMasks, PendingMasks, consume
from powerband.engine.linear.adapters import AdapterRows, AdapterWeights
from powerband.engine.models.decoder import Decoder
from powerband.engine.models.encoder import Encoder
from powerband.engine.models.registry import Model
from powerband.engine.pooling.pooler import Pooler, PoolingState, PromptChunk
from powerband.engine.sampling.logits import to_device
from powerband.engine.sampling.logprobs import prompt_logprobs
from powerband.engine.sampling.sampler import Sampled, Sampler, not_finite
from powerband.errors import InvalidRequest, PowerbandError
from powerband.structured.compiled import Grammars

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class PendingStep:
    """A step whose work has been given to the device. `result` waits for it."""

    sampled: list[tuple[list[Row], Sampled]] = field(default_factory=list)  # one entry per forward pass
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    failed: dict[str, ErrorInfo] = field(default_factory=dict)
    vectors: list[tuple[list[str], list[torch.Tensor]]] = field(default_factory=list)  # of pooled prompts, by id

    def result(self) -> StepResult:
        """Called once, in the order of the steps: the requests' states learn their new tokens here."""
        outcome = StepResult({}, {}, self.prompt_logprobs, self.failed, self._pooled())
        for rows, sampled in self.sampled:
            values = sampled.values()
            for index, row in enumerate(rows):
                state, token = row.state, values.token_ids[index]
                error = values.failed.get(index)
                if error is None and state.matcher is not None:
                    error = consume(state, state.matcher, token, outcome)
                if error is not None:
                    outcome.failed[state.id] = error
                    continue
                outcome.tokens[state.id] = [token]
                if (entry := values.logprobs[index]) is not None:
                    outcome.logprobs[state.id] = [entry]
                state.tokens += [token, *outcome.forced.get(state.id, ())]
                if state.pending is not None and state.pending[0] is sampled.token_ids:
                    state.pending = None
        return outcome

    def _pooled(self) -> dict[str, bytes]:
        """The vectors of each forward pass, copied from the device at once. One that is not finite is a failure."""
        found: dict[str, bytes] = {}
        for ids, vectors in self.vectors:
            parts = torch.split(torch.cat(vectors).cpu(), [len(vector) for vector in vectors])
            for id, part in zip(ids, parts, strict=True):
                if part.isfinite().all():
                    found[id] = part.numpy().tobytes()
                else:
                    self.failed[id] = not_finite("vector is not of")
        return found


class ModelRunner:
    """Runs steps in the order they come. `launch` returns before a GPU has finished; on a CPU it computes at once."""

    def __init__(
        self,
        model: Model,
        attention: AttentionBackend,
        sampler: Sampler,
        pooler: Pooler | None = None,
        *,
        block_size: int,
        device: torch.device,
        groups: int = 1,
        grammars: Grammars | None = None,
    ) -> None:
        """groups: of layers with block tables of their own. grammars: None where requests with one are refused."""
        self.model = model
        self.attention = attention
        self.sampler = sampler
        self.pooler = pooler
        self.device = device
        self.forward: Callable[[Inputs], torch.Tensor] = self._forward  # CUDA graphs take its place
        self._inputs = InputBuffers(
            block_size,
            device,
            by_length=model.spec.length_rope is not None,
            with_types=isinstance(model, Encoder),
            groups=groups,
        )
        self._states: dict[str, RequestState] = {}
        self.adapters: dict[str, AdapterWeights] = {}  # by digest
        self._grammars = grammars
        self._masks = GrammarMasks(grammars, device) if grammars is not None else None

    @property
    def _decoder(self) -> Decoder:
        """For logits. Whatever asks for them without a decoder was refused before."""
        if isinstance(self.model, Encoder):
            raise PowerbandError("An encoder does not generate.")
        return self.model

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
        rows.sort(key=lambda row: row.order)
        if rows:
            self._run_isolated(rows, pending)
        return pending

    def _state(self, work: Work) -> RequestState:
        """The state of the work's request, brought up to date. Raises InvalidRequest for what cannot be computed."""
        new = work.new
        if new is not None:
            vocab_size = self.model.spec.vocab_size
            if max(new.token_ids) >= vocab_size or min(new.token_ids) < 0:
                raise InvalidRequest(
                    f"The prompt has a token id outside the vocabulary (0 to {vocab_size - 1}).", param="prompt"
                )
            if new.pooling is None and not self.model.spec.generates:
                raise InvalidRequest("This model does not generate.", code="model_does_not_generate")
            if new.pooling is not None and self.pooler is None:
                raise InvalidRequest("This model gives no embeddings.", code="model_does_not_embed")
            pooling = None if new.pooling is None else PoolingState(new.pooling)
            tokens = list(new.token_ids)
            sampling = self.sampler.new_state(work.id, new.params, tokens, new.num_prompt_tokens)
            self._states[work.id] = RequestState(
                work.id,
                new.params,
                tokens,
                new.num_prompt_tokens,
                sampling,
                new.rope_length,
                self._adapter(new.adapter),
                pooling,
            )
            if new.params.grammar is not None:
                self._states[work.id].matcher = self._matcher(new.params.grammar, tokens[new.num_prompt_tokens :])
        state = self._states.get(work.id)
        if state is None:  # it failed in the step before, whose result was not known when this one was made
            raise PowerbandError(f"Request {work.id} has failed before.")
        state.append_blocks(work.new_blocks)
        return state

    def _adapter(self, digest: str) -> AdapterWeights | None:
        """What a request computes with, and keeps alive. Raises InvalidRequest."""
        if digest and digest not in self.adapters:
            raise InvalidRequest("The request's adapter is not loaded.", code="adapter_not_found", param="model")
        return self.adapters[digest] if digest else None

    def _matcher(self, grammar: str, output: list[int]) -> LLMatcher:
        if self._grammars is None:
            raise InvalidRequest("Structured output needs a tokenizer, and the model has none.", param="grammar")
        return self._grammars.matcher(grammar, output)

    def close(self) -> None:
        """End the threads."""
        if self._masks is not None:
            self._masks.close()

    def _run_isolated(self, rows: list[Row], pending: PendingStep) -> None:
        """Run all rows at once; if that fails, one by one, so that only the faulty ones fail."""
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
        starts = inputs.batch.query_starts_host
        self._fill_pending(rows, inputs.token_ids, starts)
        if isinstance(self.model, Decoder):
            self.model.adapters.groups = _adapter_rows(rows, starts)
        sampling = [index for index, row in enumerate(rows) if row.work.samples and row.state.pooling is None]
        masks = self._masks.start([rows[index] for index in sampling]) if self._masks is not None else None
        hidden = self.forward(inputs)
        for row, start, end in zip(rows, starts, starts[1:], strict=False):
            count = row.state.params.prompt_logprobs
            if count is not None and row.work.start < row.state.num_prompt_tokens - 1:
                pending.prompt_logprobs[row.state.id] = self._prompt_logprobs(row, hidden[start:end], count)
        self._pool(rows, hidden, starts, pending)
        if sampling:
            last = [starts[index + 1] - 1 for index in sampling]
            chosen = hidden if len(last) == len(hidden) else hidden[self._indices(last)]
            self._sample([rows[index] for index in sampling], chosen, masks, pending)

    def _forward(self, inputs: Inputs) -> torch.Tensor:
        if isinstance(self.model, Encoder):
            encoded: torch.Tensor = self.model(inputs.token_ids, inputs.positions, inputs.batch, inputs.types)
            return encoded
        hidden: torch.Tensor = self.model(
            inputs.token_ids, inputs.positions, inputs.batch, self.attention, inputs.rope_lengths
        )
        return hidden

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
            token_ids[self._indices(targets)] = ids[self._indices(source_rows)]

    def _prompt_logprobs(self, row: Row, hidden: torch.Tensor, count: int) -> list[TokenLogprobs]:
        """Rows of the prompt's positions start + 1 and on; `hidden` are the states at start and on."""
        state, start = row.state, row.work.start
        wanted = state.tokens[start + 1 : min(start + row.work.num_tokens + 1, state.num_prompt_tokens)]
        return prompt_logprobs(hidden, self._decoder.logits, wanted, count)

    def _sample(self, rows: list[Row], hidden: torch.Tensor, masks: PendingMasks | None, pending: PendingStep) -> None:
        states = [row.state.sampling for row in rows]
        if masks is not None:
            masks.put()
        found = self._decoder.argmax(hidden) if self.sampler.wants_only_argmax(states) else None
        if found is not None:
            sampled = self.sampler.accept(*found)
        else:
            positions = [row.work.start + row.work.num_tokens for row in rows]
            sampled = self.sampler.sample(self._decoder.logits(hidden), states, positions)
        pending.sampled.append((rows, sampled))
        for index, row in enumerate(rows):
            row.state.pending = (sampled.token_ids, index)

    def _pool(self, rows: list[Row], hidden: torch.Tensor, starts: list[int], pending: PendingStep) -> None:
        chunks = []
        ids = []
        for row, start, end in zip(rows, starts, starts[1:], strict=False):
            if row.state.pooling is not None:
                work = row.work
                position = work.start + work.num_tokens
                chunks.append(PromptChunk(row.state.pooling, start, end, position, work.start == 0, work.samples))
                if work.samples:
                    ids.append(work.id)
        if chunks and self.pooler is not None:
            vectors = self.pooler.pool(hidden, self.model.norm, chunks)
            if vectors:
                pending.vectors.append((ids, vectors))

    def _indices(self, values: list[int]) -> torch.Tensor:
        return to_device(values, torch.int64, self.device)


def _adapter_rows(rows: list[Row], starts: list[int]) -> list[AdapterRows]:
    """The tokens of each adapter, of rows that lie together."""
    groups: list[AdapterRows] = []
    for row, start, end in zip(rows, starts, starts[1:], strict=False):
        weights = row.state.adapter
        if weights is None:
            continue
        if groups and groups[-1].weights is weights and groups[-1].end == start:
            start = groups.pop().start
        groups.append(AdapterRows(weights, start, end))
    return groups
