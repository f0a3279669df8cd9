"""What the steps of a tokenizer.json may cost: how much longer they may make a text, and how long a word may be.

Steps that replace text multiply: ten of them that write ten characters for one turn a prompt of three characters into
gigabytes, in a library that ends the process then.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

MAX_GROWTH = 256.0  # characters, or tokens, for one; published tokenizers have at most 36
MAX_ADDED_TOKENS = 1024  # by the post-processor
MAX_WORD_CHARS = 1000  # of WordPiece, whose time grows with their square; published ones have 100
_TRIE_SIZE_BYTES = 4


def check_growth(rust: RustTokenizer) -> None:
    """Raises ValueError for a tokenizer whose texts may grow beyond the limits."""
    encoding = (*_steps(rust.normalizer, "normalizers"), *_steps(rust.pre_tokenizer, "pretokenizers"))
    _check("normalizer and pre-tokenizer make", math.prod(map(_growth, encoding)))
    _check("decoder makes", math.prod(map(_growth, _steps(rust.decoder, "decoders"))))
    templates = [step for step in _steps(rust.post_processor, "processors") if step["type"] == "TemplateProcessing"]
    _check(
        "post-processor makes", math.prod(sum("Sequence" in piece for piece in step["single"]) for step in templates)
    )
    num_added = sum(map(_num_added, templates))
    if num_added > MAX_ADDED_TOKENS:
        raise ValueError(
            f"its post-processor adds {num_added:,} tokens to each text; the limit is {MAX_ADDED_TOKENS:,}"
        )
    word_chars = getattr(rust.model, "max_input_chars_per_word", 0)
    if word_chars > MAX_WORD_CHARS:
        raise ValueError(f"its max_input_chars_per_word is {word_chars:,}; the limit is {MAX_WORD_CHARS:,}")


def _check(what: str, growth: float) -> None:
    if growth > MAX_GROWTH:
        raise ValueError(f"its {what} a text up to {growth:,.0f} times as long; the limit is {MAX_GROWTH:g}")


def _steps(part: Any, members: str) -> Iterator[dict[str, Any]]:
    """A part's steps as in tokenizer.json, those of sequences one by one."""
    if part is not None:
        yield from _flat(json.loads(part.__getstate__()), members)


def _flat(step: dict[str, Any], members: str) -> Iterator[dict[str, Any]]:
    if step["type"] == "Sequence":
        for one in step[members]:
            yield from _flat(one, members)
    else:
        yield step


def _growth(step: dict[str, Any]) -> float:
    """Upper bound of the characters that a step writes for one. Steps that write a fixed text count as 1."""
    match step["type"]:
        case "Replace":
            pattern = step["pattern"].get("String")
            return max(1.0, len(step["content"]) / len(pattern)) if pattern else 1.0 + len(step["content"])
        case "Prepend":  # to each piece of text between special tokens
            return 1.0 + len(step["prepend"])
        case "ByteLevel":  # a byte as a character, which has two bytes itself
            return 2.0
        case "Precompiled":
            return _max_replacement_chars(step["precompiled_charsmap"])
    return 1.0


def _max_replacement_chars(charsmap: str | list[int]) -> float:
    """SentencePiece's: the size of a trie, the trie, then all replacements, each ended by a zero byte."""
    data = base64.b64decode(charsmap) if isinstance(charsmap, str) else bytes(charsmap)
    trie_bytes = int.from_bytes(data[:_TRIE_SIZE_BYTES], "little")
    replacements = data[_TRIE_SIZE_BYTES + trie_bytes :].split(b"\0")
    return float(max(1, *(len(one.decode(errors="replace")) for one in replacements)))


def _num_added(template: dict[str, Any]) -> int:
    ids = {name: len(token["ids"]) for name, token in template["special_tokens"].items()}
    return sum(ids[piece["SpecialToken"]["id"]] for piece in template["single"] if "SpecialToken" in piece)
