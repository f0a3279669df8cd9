"""What a request's parameters do to its logits before a token is chosen: masks, biases and penalties.

Order and meaning are vLLM's: allowed tokens, bad words, minimum length, logit bias, then the penalties.

Nothing here waits for the device. The last sampled token may be known there only, while the next step is already
being sampled, so the penalties read the tokens from `SamplingState.history`, which lives on the device and is written
from the sampled tensor itself. Positions are always known on the host. So tokens are the same with and without overlap.

    history   [ prompt ......... | output ........... | room ]
              0                  num_prompt_tokens    position (the token being chosen goes here)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from powerband.core.params import SamplingParams

_NO_TOKEN = -1  # in a window: before the output began


class BadWords:
    """Words of several tokens that must not be completed, as their tokens one after the other.

    tokens    [ word 0 but its last | word 1 but its last | ... ]     int64 [total]
    distance  how far each stands from the output's end               int64 [total]
    """

    __slots__ = ("_distance", "_lengths", "_tokens", "_word", "last", "max_length")

    def __init__(self, words: list[list[int]], device: torch.device) -> None:
        lengths = [len(word) - 1 for word in words]
        self.max_length = max(lengths)
        self.last = to_device([word[-1] for word in words], torch.int64, device)
        self._lengths = to_device(lengths, torch.int64, device)
        self._tokens = to_device([id for word in words for id in word[:-1]], torch.int64, device)
        self._distance = to_device([n - i for n in lengths for i in range(n)], torch.int64, device)
        self._word = to_device([i for i, n in enumerate(lengths) for _ in range(n)], torch.int64, device)

    def biases(self, window: Tensor) -> Tensor:
        """What to add to the logits of `last`: -inf for each word whose beginning ends `window` [max_length]."""
        equal = window[self.max_length - self._distance] == self._tokens
        found = torch.zeros_like(self._lengths).index_add_(0, self._word, equal.long())
        return torch.zeros(len(found), device=found.device).masked_fill_(found == self._lengths, -math.inf)


class FixedEdits:
    """What parameters alone ask for, whatever the output: made once for all states whose parameters share their lists.

    allowed: token ids, each once. bias, end_bias: (token ids, what to add to their logits).
    """

    __slots__ = ("__weakref__", "_lists", "allowed", "bad_words", "bias", "end_bias")

    def __init__(self, params: SamplingParams, device: torch.device) -> None:
        self._lists = _lists_of(params)  # kept, so that no other list gets their identity
        words = params.bad_words_token_ids or []
        biases = list((params.logit_bias or {}).items())
        biases += [(word[0], -math.inf) for word in words if len(word) == 1]
        several = [word for word in words if len(word) > 1]
        if params.grammar is not None and params.ignore_eos:  # the end of the grammar ends the answer
            biases += [(id, -math.inf) for id in params.eos_token_ids or []]
        ends = params.end_token_ids if params.min_tokens else []
        self.bias = _biases(biases, device) if biases else None
        self.end_bias = _biases([(id, -math.inf) for id in ends], device) if ends else None
        self.bad_words = BadWords(several, device) if several else None
        self.allowed: Tensor | None = None
        if params.allowed_token_ids is not None:
            self.allowed = to_device(sorted(set(params.allowed_token_ids)), torch.int64, device)

    @staticmethod
    def key(params: SamplingParams) -> tuple[int, ...]:
        """Equal for parameters that share their lists, as long as one of them lives."""
        return (*map(id, _lists_of(params)), int(params.min_tokens > 0), int(params.grammar is not None))


def _lists_of(params: SamplingParams) -> tuple[object, ...]:
    words, allowed = params.bad_words_token_ids, params.allowed_token_ids
    return params.logit_bias, words, allowed, params.stop_token_ids, params.eos_token_ids


def _biases(biases: Sequence[tuple[int, float]], device: torch.device) -> tuple[Tensor, Tensor]:
    values = to_device([float(bias) for _, bias in biases], torch.float32, device)
    return to_device([id for id, _ in biases], torch.int64, device), values


class SamplingState:
    """What the sampler keeps of one request, from its parameters and the tokens known so far.

    It is rebuilt from its tokens when a request resumes after preemption. `fixed`: shared with others, or None.
    """

    __slots__ = (
        "_device",
        "_edits",
        "_fixed",
        "_history",
        "is_penalized",
        "keeps_history",
        "mask",
        "num_prompt_tokens",
        "params",
        "seed",
    )

    def __init__(
        self,
        request_id: str,
        params: SamplingParams,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        *,
        engine_seed: int,
        device: torch.device,
        fixed: FixedEdits | None = None,
    ) -> None:
        self.params = params
        self.num_prompt_tokens = num_prompt_tokens
        self.seed = _derived_seed(engine_seed, request_id) if params.seed is None else params.seed % 2**64
        self._device = device
        self._fixed = fixed = FixedEdits(params, device) if fixed is None else fixed
        self.is_penalized = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        )
        self.keeps_history = self.is_penalized or fixed.bad_words is not None
        room = 256 if params.max_tokens is None else min(params.max_tokens, 4096)
        self._history = F.pad(self._ids(token_ids), (0, room)) if self.keeps_history else self._ids([])
        self._edits = self.keeps_history or any(
            part is not None for part in (fixed.bias, fixed.end_bias, fixed.allowed)
        )
        # Of the token to be chosen next: int32 [words], bit i % 32 of word i // 32 says whether token i may be it.
        self.mask: Tensor | None = None

    @property
    def edits_logits(self) -> bool:
        return self._edits or self.mask is not None

    @property
    def allowed(self) -> Tensor | None:
        """Ids of the only tokens that may be chosen, each once; None: all. Shared with other states."""
        return self._fixed.allowed

    @property
    def may_skip_choices(self) -> bool:
        """Whether a token that its mask leaves as the only one is certain to be chosen, and nothing else is asked."""
        p = self.params
        return p.logprobs is None and p.allowed_token_ids is None and p.bad_words_token_ids is None

    def record(self, position: int, token_ids: Tensor) -> None:
        """Note the tokens at `position` and on, as a tensor [tokens] on the device."""
        if not self.keeps_history:
            return
        end = position + len(token_ids)
        if end > len(self._history):
            self._history = F.pad(self._history, (0, max(end, len(self._history))))
        self._history[position:end] = token_ids

    @torch.inference_mode()
    def record_known(self, position: int, token_ids: Sequence[int]) -> None:
        """The same with tokens from the host."""
        if self.keeps_history:
            self.record(position, self._ids(token_ids))

    def tokens(self, start: int, end: int) -> Tensor:
        """Tokens at [start, end) on the device, for a state that keeps its history."""
        return self._history[start:end]

    def added_biases(self, position: int) -> list[tuple[Tensor, Tensor]]:
        """(token ids, what to add to their logits), as of `position`."""
        fixed = self._fixed
        biases = [] if fixed.bias is None else [fixed.bias]
        if fixed.end_bias is not None and position - self.num_prompt_tokens < self.params.min_tokens:
            biases.append(fixed.end_bias)
        if fixed.bad_words is not None:
            biases.append((fixed.bad_words.last, fixed.bad_words.biases(self._window(fixed.bad_words, position))))
        return biases

    def keep_allowed(self, row: Tensor) -> None:
        """Set the logits [vocab] of all tokens but the allowed ones to -inf."""
        if self.allowed is not None:
            values = row[self.allowed]
            row.fill_(-math.inf)
            row[self.allowed] = values

    def _window(self, words: BadWords, position: int) -> Tensor:
        """The output's last tokens, `max_length` of them, padded in front."""
        num_known = min(words.max_length, position - self.num_prompt_tokens)
        window = torch.full((words.max_length,), _NO_TOKEN, dtype=torch.int64, device=self._device)
        window[words.max_length - num_known :] = self.tokens(position - num_known, position)
        return window

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return to_device(ids, torch.int64, self._device)


class LogitsEditor:
    """Applies what states ask for to rows of logits. Keeps one scratch buffer, zero between calls."""

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(0, dtype=torch.float32, device=device)

    def edit(self, logits: Tensor, states: Sequence[SamplingState], positions: Sequence[int]) -> None:
        """Edit float32 logits [rows, width] in place, each row as its state asks for a token at its position."""
        width = logits.shape[1]
        flat = logits.view(-1)
        rows = [(row, *pair) for row, pair in enumerate(zip(states, positions, strict=True))]
        ids: list[Tensor] = []
        values: list[Tensor] = []
        _keep_masked(logits, states)
        for row, state, position in rows:
            state.keep_allowed(logits[row])
            for bias_ids, bias_values in state.added_biases(position):
                ids.append(bias_ids + row * width)
                values.append(bias_values)
        if ids:
            flat.index_add_(0, torch.cat(ids), torch.cat(values))
        penalized = [item for item in rows if item[1].is_penalized]
        if penalized:
            self._penalize_repetition(flat, width, penalized)
            self._penalize_frequency(flat, width, penalized)

    def _penalize_repetition(self, flat: Tensor, width: int, rows: list[tuple[int, SamplingState, int]]) -> None:
        """Tokens of prompt and output: divide a positive logit, multiply a negative one (Keskar et al. 2019)."""
        rows = [item for item in rows if item[1].params.repetition_penalty != 1.0]
        if not rows:
            return
        where = torch.cat([state.tokens(0, position) + row * width for row, state, position in rows])
        penalty = _spread(
            [state.params.repetition_penalty for _, state, _ in rows], [position for _, _, position in rows], flat
        )
        values = flat[where]
        # A token that occurs twice is written twice, with the same value.
        flat[where] = torch.where(values > 0, values / penalty, values * penalty)

    def _penalize_frequency(self, flat: Tensor, width: int, rows: list[tuple[int, SamplingState, int]]) -> None:
        """Tokens of the output: subtract the presence penalty, and the frequency penalty per occurrence."""
        rows = [
            (row, state, position)
            for row, state, position in rows
            if position > state.num_prompt_tokens
            and (state.params.presence_penalty != 0.0 or state.params.frequency_penalty != 0.0)
        ]
        if not rows:
            return
        if len(self._counts) < len(flat):
            self._counts = torch.zeros_like(flat)
        where = torch.cat(
            [state.tokens(state.num_prompt_tokens, position) + row * width for row, state, position in rows]
        )
        lengths = [position - state.num_prompt_tokens for _, state, position in rows]
        presence = _spread([state.params.presence_penalty for _, state, _ in rows], lengths, flat)
        frequency = _spread([state.params.frequency_penalty for _, state, _ in rows], lengths, flat)
        self._counts.index_add_(0, where, torch.ones_like(presence))
        try:
            flat[where] = flat[where] - frequency * self._counts[where] - presence
        finally:  # when memory runs out, the next step must still find zeros
            self._counts[where] = 0.0


def _keep_masked(logits: Tensor, states: Sequence[SamplingState]) -> None:
    """Set the logits [rows, width] of tokens that a row's mask leaves out to -inf."""
    masked = [(row, state.mask) for row, state in enumerate(states) if state.mask is not None]
    if not masked:
        return
    words = torch.stack([mask for _, mask in masked])
    bits = (words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    allowed = bits.flatten(1)[:, : logits.shape[1]].bool()
    allowed = F.pad(allowed, (0, logits.shape[1] - allowed.shape[1]))  # beyond the tokenizer's vocabulary: nothing
    rows = to_device([row for row, _ in masked], torch.int64, logits.device)
    logits[rows] = logits[rows].masked_fill_(~allowed, -math.inf)


def uniform(seed: int, position: int, draw: int = 0) -> float:
    """A number in [0, 1), multiple of 2^-48, that depends on nothing else: the `draw`-th for the token at `position`.

    Three rounds of splitmix64's finalizer (Steele, Lea, Flood 2014) as a counter-based generator, on the host.
    """
    return (_mix(_mix(_mix(seed) + position) + draw) >> 16) * 2.0**-48


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def _derived_seed(engine_seed: int, request_id: str) -> int:
    digest = hashlib.blake2b(f"{engine_seed}:{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host values. On a GPU it is copied from pinned memory, without waiting."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def _spread(values: list[float], lengths: list[int], like: Tensor) -> Tensor:
    """values[i] repeated lengths[i] times."""
    repeats = to_device(lengths, torch.int64, like.device)
    return to_device(values, torch.float32, like.device).repeat_interleave(repeats, output_size=sum(lengths))
