"""Estimates a request's output tokens for the queue, before the request has run."""

from __future__ import annotations

import math

BYTES_PER_TOKEN = 4  # roughly, in English text: prompts are measured without a tokenizer
INITIAL_OUTPUT_TOKENS = 512.0  # mean output of one sequence until one has been counted
_MAX_FACTOR = 8  # an estimate is at most this multiple of the mean output
_WEIGHT = 0.1  # of the newest in a moving mean


class OutputEstimate:
    """The mean output of one model's responses. A max_tokens far above it says nothing about the actual length."""

    def __init__(self) -> None:
        self.mean_tokens = INITIAL_OUTPUT_TOKENS

    def observe(self, output_tokens: float) -> None:
        """Record the output tokens of one sequence."""
        self.mean_tokens += (output_tokens - self.mean_tokens) * _WEIGHT

    def likely(self, max_tokens: int, num_sequences: int = 1) -> int:
        """Likely upper bound of a request's output tokens. max_tokens: the limit of all its sequences together."""
        return min(max_tokens, num_sequences * math.ceil(_MAX_FACTOR * self.mean_tokens))
