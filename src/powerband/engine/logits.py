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
_ANY_TOKEN = -2  # in the prefix of a bad word: left of its beginning


class SamplingState:
    """What the sampler keeps of one request, from its parameters and the tokens known so far.

    It is rebuilt from its tokens when a request resumes after preemption.
    """

    __slots__ = (
        "_bad_last",
        "_bad_prefixes",
        "_bias",
        "_device",
        "_end_bias",
        "_history",
        "allowed",
        "edits_logits",
        "is_penalized",
        "keeps_history",
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
    ) -> None:
        self.params = params
        self.num_prompt_tokens = num_prompt_tokens
        self.seed = _derived_seed(engine_seed, request_id) if params.seed is None else params.seed % 2**64
        self._device = device
        words = params.bad_words_token_ids or []
        self._bias = self._bias_tensors(words)
        self._end_bias = self._forbid(params.end_token_ids) if params.min_tokens and params.end_token_ids else None
        self.allowed = self._ids(params.allowed_token_ids) if params.allowed_token_ids is not None else None
        self._bad_prefixes, self._bad_last = self._prefix_tensors([word for word in words if len(word) > 1])
        self.is_penalized = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        )
        self.keeps_history = self.is_penalized or self._bad_prefixes is not None
        room = 256 if params.max_tokens is None else min(params.max_tokens, 4096)
        self._history = F.pad(self._ids(token_ids), (0, room)) if self.keeps_history else self._ids([])
        parts = (self._bias, self._end_bias, self.allowed)
        self.edits_logits = self.keeps_history or any(part is not None for part in parts)

    def record(self, position: int, token_id: Tensor) -> None:
        """Note the token at `position`, as a tensor [1] on the device."""
        if not self.keeps_history:
            return
        if position >= len(self._history):
            self._history = torch.cat([self._history, torch.zeros_like(self._history)])
        self._history[position : position + 1] = token_id

    def tokens(self, start: int, end: int) -> Tensor:
        """Tokens at [start, end) on the device, for a state that keeps its history."""
        return self._history[start:end]

    def added_biases(self, position: int) -> list[tuple[Tensor, Tensor]]:
        """(token ids, what to add to their logits), as of `position`."""
        biases = [] if self._bias is None else [self._bias]
        if self._end_bias is not None and position - self.num_prompt_tokens < self.params.min_tokens:
            biases.append(self._end_bias)
        if self._bad_prefixes is not None and self._bad_last is not None:
            biases.append((self._bad_last, self._bad_word_biases(self._bad_prefixes, position)))
        return biases

    def keep_allowed(self, row: Tensor) -> None:
        """Set the logits [vocab] of all tokens but the allowed ones to -inf."""
        if self.allowed is not None:
            values = row[self.allowed]
            row.fill_(-math.inf)
            row[self.allowed] = values

    def _bad_word_biases(self, prefixes: Tensor, position: int) -> Tensor:
        """-inf for each word of several tokens whose beginning [words, length] ends the output."""
        length = prefixes.shape[1]
        num_known = min(length, position - self.num_prompt_tokens)
        window = torch.full((length,), _NO_TOKEN, dtype=torch.int64, device=self._device)
        window[length - num_known :] = self.tokens(position - num_known, position)
        matches = ((prefixes == window) | (prefixes == _ANY_TOKEN)).all(dim=1)
        return torch.zeros(len(matches), device=self._device).masked_fill_(matches, -math.inf)

    def _bias_tensors(self, words: list[list[int]]) -> tuple[Tensor, Tensor] | None:
        biases = list((self.params.logit_bias or {}).items())
        biases += [(word[0], -math.inf) for word in words if len(word) == 1]
        if not biases:
            return None
        values = to_device([float(bias) for _, bias in biases], torch.float32, self._device)
        return self._ids([id for id, _ in biases]), values

    def _forbid(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self._ids(ids), torch.full((len(ids),), -math.inf, device=self._device)

    def _prefix_tensors(self, words: list[list[int]]) -> tuple[Tensor | None, Tensor | None]:
        if not words:
            return None, None
        length = max(map(len, words)) - 1
        prefixes = [[_ANY_TOKEN] * (length - len(word) + 1) + word[:-1] for word in words]
        return to_device(prefixes, torch.int64, self._device), self._ids([word[-1] for word in words])

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
    """A tensor of host values. On a GPU it comes through pinned memory, so that nobody waits."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def _spread(values: list[float], lengths: list[int], like: Tensor) -> Tensor:
    """values[i] repeated lengths[i] times."""
    repeats = to_device(lengths, torch.int64, like.device)
    return to_device(values, torch.float32, like.device).repeat_interleave(repeats, output_size=sum(lengths))
