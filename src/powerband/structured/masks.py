"""Which tokens each of several answers allows next, as bits."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par

Masks = npt.NDArray[np.int32]


class MaskFiller:
    """Fills masks in a thread of its own, beside the forward pass. The interpreter's lock is not held meanwhile."""

    def __init__(self, vocab_size: int) -> None:
        """vocab_size: of the tokenizer as llguidance has it."""
        self._num_words = (vocab_size + 31) // 32
        self._executor = LLExecutor()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def start(self, matchers: Sequence[LLMatcher]) -> Future[Masks]:
        """int32 [matchers, words]: bit i % 32 of word i // 32 says whether token i may come next."""
        return self._thread.submit(self._fill, list(matchers))

    def _fill(self, matchers: list[LLMatcher]) -> Masks:
        masks = np.zeros((len(matchers), self._num_words), np.int32)
        fill_next_token_bitmask_par(self._executor, [(matcher, row) for row, matcher in enumerate(matchers)], masks)
        return masks

    def close(self) -> None:
        self._thread.shutdown(wait=True)
