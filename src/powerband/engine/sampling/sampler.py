"""From the logits of a step to its tokens, for many requests with different parameters at once.

Rows are grouped by what their parameters need, so that a batch of greedy rows is one arg max and no row pays for a
neighbour's features. A row's token depends on its logits, its parameters, its seed and its position, and on nothing
else: not on the other rows, their number or order, nor on preemption. Random choice is by inverse CDF (ops.py) from
one uniform number per token, hashed from (seed, position) on the host (logits.uniform); only the rejection method
draws more. A row whose logits are not numbers fails alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from powerband.core.params import SamplingParams
from powerband.core.step import ErrorInfo, TokenLogprobs
from powerband.engine.sampling import ops
from powerband.engine.sampling.logits import FixedEdits, LogitsEditor, SamplingState, to_device, uniform
from powerband.engine.sampling.logprobs import LogprobTensors, token_logprobs, unpacked


class Method(Enum):
    """How a row's token is chosen, once its logits are edited."""

    GREEDY = "greedy"
    ALL = "all"  # any token, or those above min_p
    TOP_K = "top_k"  # a small top_k, with or without top_p and min_p
    NUCLEUS = "nucleus"  # top_p without top_k
    SORTED = "sorted"  # whatever is left


@dataclass(frozen=True, slots=True)
class SampledValues:
    """What a step sampled, on the host. Lists are per row."""

    token_ids: list[int]  # meaningless in rows that failed
    logprobs: list[TokenLogprobs | None]
    failed: dict[int, ErrorInfo]  # by row


class Sampled:
    """What a step sampled, on the device, and on its way to the host in one copy.

    `token_ids`: int64 [rows]; always inside the vocabulary, also in rows that failed.
    """

    def __init__(
        self, token_ids: Tensor, peaks: Tensor, logprob_rows: list[int], counts: list[int], rest: Tensor
    ) -> None:
        self.token_ids = token_ids
        self._logprob_rows = logprob_rows
        self._counts = counts
        self._shape = rest.shape
        packed = torch.cat([token_ids, peaks.double().view(torch.int64), rest.flatten()])
        self._copied: torch.cuda.Event | None = None
        if packed.device.type == "cuda":
            self._packed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._packed.copy_(packed, non_blocking=True)
            self._copied = torch.cuda.current_stream(packed.device).record_event()
        else:
            self._packed = packed
        self._values: SampledValues | None = None

    def values(self) -> SampledValues:
        """Wait for the device and return everything. May be called again."""
        if self._values is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._values = self._unpack()
        return self._values

    def _unpack(self) -> SampledValues:
        num_rows = len(self.token_ids)
        peaks = self._packed[num_rows : 2 * num_rows].view(torch.float64).tolist()
        failed = {row: _failure(peak) for row, peak in enumerate(peaks) if not math.isfinite(peak)}
        logprobs: list[TokenLogprobs | None] = [None] * num_rows
        entries = unpacked(self._packed[2 * num_rows :].view(self._shape)) if self._logprob_rows else []
        for row, count, entry in zip(self._logprob_rows, self._counts, entries, strict=True):
            if row not in failed:
                logprobs[row] = TokenLogprobs(entry.token_ids[: 1 + count], entry.logprobs[: 1 + count], entry.rank)
        return SampledValues(self._packed[:num_rows].tolist(), logprobs, failed)


class SamplingKernels(Protocol):
    """What a device may have faster: the same choices and figures, of whole batches. See cpu.py."""

    def sample(
        self, logits: Tensor, states: Sequence[SamplingState], positions: Sequence[int]
    ) -> tuple[Tensor, Tensor]: ...

    def logprobs(self, logits: Tensor, token_ids: Tensor, num_alternatives: int) -> tuple[Tensor, Tensor, Tensor]: ...


class Sampler:
    """Samples the rows of a step. `seed` stands in for requests that bring none."""

    def __init__(self, vocab_size: int, device: torch.device | str, seed: int) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.seed = seed
        self.kernels: SamplingKernels | None = None
        self._editor = LogitsEditor(self.device)
        self._fixed: WeakValueDictionary[tuple[int, ...], FixedEdits] = WeakValueDictionary()
        self._memory = [torch.empty(0, device=self.device) for _ in range(2)]

    def new_state(
        self, request_id: str, params: SamplingParams, token_ids: Sequence[int], num_prompt_tokens: int
    ) -> SamplingState:
        """State of a request that is new, or resumed, with these known tokens. Raises InvalidRequest."""
        key = FixedEdits.key(params)
        fixed = self._fixed.get(key)
        if fixed is None:
            params.check_vocabulary(self.vocab_size)
            fixed = self._fixed[key] = FixedEdits(params, self.device)
        return SamplingState(
            request_id, params, token_ids, num_prompt_tokens, engine_seed=self.seed, device=self.device, fixed=fixed
        )

    @torch.inference_mode()
    def sample(self, logits: Tensor, states: Sequence[SamplingState], positions: Sequence[int]) -> Sampled:
        """Choose a token per row of logits [rows, vocab] (any float type; not changed).

        `positions[i]` is where the new token of row i will stand: the number of tokens before it. Steps must be sampled
        in order, but the values of earlier ones need not be known on the host. Does not wait for a GPU.
        """
        if self.kernels is not None:
            token_ids, peaks = self.kernels.sample(logits, states, positions)
        else:
            token_ids, peaks = self._by_method(logits, states, positions)
        for row, state in enumerate(states):
            state.record(positions[row], token_ids[row : row + 1])
        return self._with_logprobs(logits, states, token_ids, peaks)

    def wants_only_argmax(self, states: Sequence[SamplingState]) -> bool:
        """Whether the largest logit of each row is all that these need: then `accept` may stand for `sample`."""
        return all(
            state.params.is_greedy and not state.edits_logits and state.params.logprobs is None for state in states
        )

    def accept(self, token_ids: Tensor, peaks: Tensor) -> Sampled:
        """The tokens [rows] of a step that wanted only them, and their logits [rows], from the model's head."""
        return Sampled(token_ids.to(torch.int64), peaks.float(), [], [], token_ids[:0].to(torch.int64))

    def _by_method(
        self, logits: Tensor, states: Sequence[SamplingState], positions: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        groups: dict[tuple[Method, bool], list[int]] = {}
        for row, state in enumerate(states):
            groups.setdefault((self._method(state.params), state.edits_logits), []).append(row)
        token_ids = torch.empty(len(states), dtype=torch.int64, device=self.device)
        peaks = torch.empty(len(states), dtype=torch.float32, device=self.device)
        for (method, edits), rows in groups.items():
            for some in ops.portions(rows, logits):
                own = [states[row] for row in some], [positions[row] for row in some]
                self._put(token_ids, peaks, some, self._choose(method, edits, self._rows(logits, some), *own))
        return token_ids, peaks

    def _method(self, params: SamplingParams) -> Method:
        if params.is_greedy:
            return Method.GREEDY
        has_top_k = 0 < params.top_k < self.vocab_size
        if has_top_k and params.top_k <= ops.MAX_SMALL_K:
            return Method.TOP_K
        if params.top_p < 1 and not has_top_k and self.device.type == "cpu":
            return Method.NUCLEUS
        return Method.SORTED if has_top_k or params.top_p < 1 else Method.ALL

    def _choose(
        self, method: Method, edits: bool, logits: Tensor, states: list[SamplingState], positions: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Token ids and largest logits of rows that all use `method`, and all or none edit their logits."""
        if method is Method.GREEDY and not edits:
            return ops.argmax(logits.float())
        vocab_size = logits.shape[1]
        values, spare = self._working_memory(len(logits))
        values[:, vocab_size:] = -math.inf
        temperatures = self._numbers([state.params.temperature for state in states]).float().unsqueeze(1)
        if edits:
            values[:, :vocab_size] = logits
            self._editor.edit(values, states, positions)
            if method is Method.GREEDY:
                return ops.argmax(values)
            values.div_(temperatures)
        else:
            torch.div(logits, temperatures, out=values[:, :vocab_size])
        peaks = values.amax(1)
        token_ids = self._draw(method, values, spare, states, positions)
        return token_ids.clamp_(max=vocab_size - 1), peaks

    def _working_memory(self, rows: int) -> list[Tensor]:
        """Two tensors [rows, whole blocks], the same ones in every call."""
        width = ops.padded_width(self.vocab_size)
        if len(self._memory[0]) < rows * width:
            self._memory = [torch.empty(rows * width, device=self.device) for _ in self._memory]
        return [memory[: rows * width].view(rows, width) for memory in self._memory]

    def _draw(
        self, method: Method, values: Tensor, spare: Tensor, states: list[SamplingState], positions: list[int]
    ) -> Tensor:
        def uniforms(number: int) -> Tensor:
            pairs = zip(states, positions, strict=True)
            return self._numbers([uniform(state.seed, position, number) for state, position in pairs])

        params = [state.params for state in states]
        uses_min_p = any(p.min_p > 0 for p in params)
        min_p = self._numbers([p.min_p for p in params]) if uses_min_p or method is Method.TOP_K else None
        if method is Method.ALL:
            return ops.draw(values, spare, min_p, uniforms)
        top_p = self._numbers([p.top_p for p in params])
        if method is Method.NUCLEUS:
            return ops.draw_nucleus(values, spare, top_p, min_p, uniforms)
        limits = [p.top_k if 0 < p.top_k < self.vocab_size else values.shape[1] for p in params]
        top_k = to_device(limits, torch.int64, self.device)
        if min_p is not None and method is Method.TOP_K:
            return ops.draw_top_k(values, top_k, top_p, min_p, uniforms)
        return ops.draw_sorted(values, spare, max(limits), top_k, top_p, min_p, uniforms)

    def _with_logprobs(
        self, logits: Tensor, states: Sequence[SamplingState], token_ids: Tensor, peaks: Tensor
    ) -> Sampled:
        rows = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        counts = [count for state in states if (count := state.params.logprobs) is not None]
        if not rows:
            return Sampled(token_ids, peaks, [], [], token_ids[:0])
        found = self.token_logprobs(self._rows(logits, rows), self._rows(token_ids, rows), max(counts))
        return Sampled(token_ids, peaks, rows, counts, found.packed())

    def token_logprobs(self, logits: Tensor, token_ids: Tensor, num_alternatives: int) -> LogprobTensors:
        """As logprobs.token_logprobs, by a kernel where there is one."""
        if self.kernels is None:
            return token_logprobs(logits, token_ids, num_alternatives)
        return LogprobTensors(*self.kernels.logprobs(logits, token_ids, num_alternatives))

    def _rows(self, values: Tensor, rows: Sequence[int]) -> Tensor:
        if rows[-1] - rows[0] == len(rows) - 1:  # they are in ascending order
            return values[rows[0] : rows[-1] + 1]
        return values[to_device(rows, torch.int64, self.device)]

    def _put(self, token_ids: Tensor, peaks: Tensor, rows: Sequence[int], chosen: tuple[Tensor, Tensor]) -> None:
        if len(rows) == len(token_ids):
            token_ids.copy_(chosen[0])
            peaks.copy_(chosen[1])
        else:
            where = to_device(rows, torch.int64, self.device)
            token_ids[where] = chosen[0]
            peaks[where] = chosen[1]

    def _numbers(self, values: list[float]) -> Tensor:
        return to_device(values, torch.float64, self.device)


def _failure(peak: float) -> ErrorInfo:
    if peak == -math.inf:
        return ErrorInfo(
            "no_token_left",
            "allowed_token_ids, bad_words, logit_bias, min_tokens and the form of the answer leave no token to sample.",
            "Ask for less, or allow more tokens.",
            http_status=400,
        )
    return not_finite("logits are not")


def not_finite(what: str) -> ErrorInfo:
    return ErrorInfo(
        "not_finite",
        f"The model's {what} finite numbers.",
        "The checkpoint may be damaged, or its values overflow this dtype: try dtype=bfloat16 or float32.",
    )
