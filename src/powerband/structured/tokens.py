"""A tokenizer as llguidance needs it: the bytes of every token, and which of them are special."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLTokenizer

from powerband.errors import EnvironmentFault


def grammar_tokens(tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """Takes a second for a large vocabulary. Raises EnvironmentFault.

    vocab_size: width of the logits, where it is larger than the tokenizer. eos_token_ids: what may end an answer; where
    the model has none, an answer ends with the last token that its form allows.
    """
    try:
        return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids) or [vocab_size - 1])
    except ValueError as error:
        raise EnvironmentFault(
            f"Structured output is not possible with this model's tokenizer: {str(error)[:300]}.",
            hint="Ask without a form.",
            code="structured_outputs_not_available",
        ) from error
