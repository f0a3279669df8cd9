"""Grammars of requests beside a step: masks are filled while the forward pass runs, tokens are consumed after it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import torch

from powerband.core.step import ErrorInfo
from powerband.engine.executor.batch import RequestState, Row
from powerband.structured.compiled import Grammars, reason
from powerband.structured.masks import MaskFiller, Masks


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


def consume(state: RequestState, token_id: int) -> tuple[ErrorInfo | None, bool]:
    """Advance the state's grammar by its token. Returns the error, and whether the grammar ends here."""
    matcher = state.matcher
    if matcher is None:
        return None, False
    if matcher.consume_token(token_id):
        return None, matcher.is_stopped()
    return ErrorInfo(
        "grammar_failed",
        f"The answer's form could not be followed any further: {reason(matcher)}.",
        "Ask for a simpler form.",
    ), False
