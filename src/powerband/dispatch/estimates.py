"""How many output tokens a request counts for in the queue, before it has any."""

from __future__ import annotations

import math

BYTES_PER_TOKEN = 4  # of English text, about: how prompts are measured without a tokenizer
INITIAL_OUTPUT_TOKENS = 512.0  # of one answer, before any was counted
_MAX_FACTOR = 8  # times the mean output, that a request counts for at most
_WEIGHT = 0.1  # of the newest in a moving mean


class OutputEstimate:
    """The mean output of one model's answers. A limit far beyond it says nothing of a request's length."""

    def __init__(self) -> None:
        self.mean_tokens = INITIAL_OUTPUT_TOKENS

    def observe(self, output_tokens: float) -> None:
        """An answer had so many."""
        self.mean_tokens += (output_tokens - self.mean_tokens) * _WEIGHT

    def likely(self, max_tokens: int, answers: int = 1) -> int:
        """Of a request for so many answers with at most max_tokens in all."""
        return min(max_tokens, answers * math.ceil(_MAX_FACTOR * self.mean_tokens))
