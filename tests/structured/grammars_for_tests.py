"""Grammars over bytes, without a model: whether they accept a text."""

from __future__ import annotations

import functools
from typing import Any

from llguidance import LLTokenizer

from powerband.core.structured_outputs import StructuredOutputsParams
from powerband.structured.compiled import compile_grammar
from powerband.structured.specification import grammar_of

END = 256


class _Bytes:
    """llguidance's interface to a tokenizer whose tokens are the 256 bytes, and an end."""

    is_tokenizer_wrapper = True
    eos_token_id = END
    bos_token_id = None
    tokens = [bytes([byte]) for byte in range(256)] + [b"<end>"]
    special_token_ids = (END,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@functools.cache
def byte_tokens() -> LLTokenizer:
    return LLTokenizer(_Bytes())


def grammar(**form: Any) -> str:
    return grammar_of(StructuredOutputsParams(**form), byte_tokens())


def accepts(grammar: str, text: str) -> bool:
    matcher = compile_grammar(byte_tokens(), grammar)
    return all(map(matcher.consume_token, text.encode())) and matcher.is_accepting()
