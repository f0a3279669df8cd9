"""Grammars of requests beside a step: masks are filled while the forward pass runs, tokens are consumed after it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future

import torch
from llguidance import LLMatcher

from powerband.core.step import ErrorInfo, StepResult
from powerband.engine.executor.batch import RequestState, Row
from powerband.structured.compiled import Grammars, reason
from powerband.structured.masks import MaskFiller, Masks

MAX_FORCED_TOKENS = 256  # after one step: consuming them takes some microseconds each, and all requests wait


class GrammarMasks:
    """Belongs to one model runner. Without `grammars` no request may have one."""

    def __init__(self, grammars: Grammars, device: torch.device) -> None:
        self._grammars = grammars
        self._device = device
        self._filler: MaskFiller | None = None

    def start(self, rows: Sequence[Row]) -> PendingMasks | None:
        """Begin to fill the masks of rows that sample; None where none has a grammar."""
        states = [row.state for row in rows if row.state.matcher is not None]
        if not states:
            return None
        if self._filler is None:
            self._filler = MaskFiller(self._grammars.tokens.vocab_size)
        matchers = [state.matcher for state in states if state.matcher is not None]
        return PendingMasks(states, self._filler.start(matchers), self._device)

    def close(self) -> None:
        if self._filler is not None:
            self._filler.close()


class PendingMasks:
    """Masks that are being filled."""

    def __init__(self, states: Sequence[RequestState], filling: Future[Masks], device: torch.device) -> None:
        self._states = states
        self._filling = filling
        self._device = device

    def put(self) -> None:
        """Wait for them, and give each state its mask for the token that is chosen next."""
        masks = torch.from_numpy(self._filling.result())
        if self._device.type == "cuda":
            masks = masks.pin_memory().to(self._device, non_blocking=True)
        for state, mask in zip(self._states, masks, strict=True):
            state.sampling.mask = mask


def consume(state: RequestState, matcher: LLMatcher, token_id: int, outcome: StepResult) -> ErrorInfo | None:
    """Advance the state's grammar by its token, and by what that leaves no choice about, which `outcome` gets."""
    is_followed = matcher.consume_token(token_id)
    if is_followed and state.sampling.may_skip_choices:
        forced = _take_forced(state, matcher)
        if forced:
            outcome.forced[state.id] = forced
            state.sampling.record_known(len(state.tokens) + 1, forced)
    if not is_followed or matcher.is_error():
        return ErrorInfo(
            "grammar_failed",
            f"The answer's form could not be followed any further: {reason(matcher)}.",
            "Ask for a simpler form.",
        )
    if matcher.is_stopped():
        outcome.complete.add(state.id)
    return None


def _take_forced(state: RequestState, matcher: LLMatcher) -> list[int]:
    """Consume the tokens of which every mask would allow nothing else.

    They are llguidance's fast-forward tokens: where it has some, its mask has a single bit, that of the first. So no
    sampling could choose differently, and what the model sees is what it would have written. Tokens that may end an
    answer are left to the sampler, which knows about `min_tokens`.
    """
    found = matcher.compute_ff_tokens()[:MAX_FORCED_TOKENS]
    if found:
        ends = set(state.params.end_token_ids)
        found = list(itertools.takewhile(lambda id: id not in ends, found))
        matcher.consume_tokens(found)
    return found
