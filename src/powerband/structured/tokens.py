"""A tokenizer as llguidance needs it: the bytes of every token, and which of them are special."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLTokenizer

from powerband.errors import InvalidRequest

NOT_AVAILABLE = "structured_outputs_not_available"


def grammar_tokens(tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """Takes a second for a large vocabulary. Raises InvalidRequest for a tokenizer that llguidance cannot read.

    vocab_size: width of the logits, where it is larger than the tokenizer. eos_token_ids: what may end an answer; where
    the model has none, an answer ends with the last token that its form allows.
    """
    try:
        return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids) or [vocab_size - 1])
    except Exception as error:  # the library raises more than it documents
        raise not_available(
            f"Structured output is not possible with this model's tokenizer, which llguidance cannot read: "
            f"{str(error)[:300]}."
        ) from error


def not_available(message: str) -> InvalidRequest:
    hint = "Leave out response_format, structured_outputs and tools; everything else is served."
    return InvalidRequest(message, hint=hint, code=NOT_AVAILABLE)
