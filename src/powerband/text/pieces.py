"""The bytes that each token stands for, worked out from the decoder described in tokenizer.json.

Two families cover the models that are served: byte-level BPE, whose pieces spell bytes with printable characters, and
SentencePiece style, whose pieces spell spaces as "▁" and rare bytes as "<0x0A>". Anything else has no bytes per token.

Below: `clean_up_tokenization_spaces`, which takes spaces before punctuation and English contractions out of decoded
text, as `clean_up_tokenization` of transformers does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _printable_bytes() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for characters from U+0100 on."""
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(b): b for b in themselves}
    others = (b for b in range(256) if b not in set(themselves))
    alphabet.update({chr(0x100 + i): b for i, b in enumerate(others)})
    return alphabet


_BYTE_OF = _printable_bytes()


@dataclass(frozen=True, slots=True)
class PieceRules:
    """How a decoder turns a piece into bytes, and what it does to the beginning of a text."""

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_spaces: int = 0  # leading spaces taken off the text
    drop_first_spaces: bool = False  # Metaspace: the first piece loses all its spaces

    def to_bytes(self, piece: str) -> bytes:
        if self.byte_level:
            values = [_BYTE_OF.get(char, -1) for char in piece]
            # An added token may hold characters outside the alphabet: it is then meant literally.
            return piece.encode() if -1 in values else bytes(values)
        for old, new in self.replacements:
            piece = piece.replace(old, new)
        if self.byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return piece.encode()


def piece_rules(decoder: dict[str, Any] | None) -> PieceRules | None:
    """The rules of tokenizer.json's "decoder", or None when it cannot be taken token by token."""
    if decoder is None:
        return None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return PieceRules(byte_level=True)
    if kinds == ["Metaspace"]:
        keeps_space = steps[0].get("prepend_scheme", "always") == "never"
        return PieceRules(replacements=((steps[0]["replacement"], " "),), drop_first_spaces=not keeps_space)
    return _sentencepiece_rules(steps)


def _sentencepiece_rules(steps: list[dict[str, Any]]) -> PieceRules | None:
    replacements: list[tuple[str, str]] = []
    byte_fallback = fused = False
    strip_spaces = 0
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not fused:
                replacements.append((old, new))
            case {"type": "ByteFallback"} if not fused:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused:
                strip_spaces += start
            case _:
                return None
    if not fused:
        return None
    return PieceRules(replacements=tuple(replacements), byte_fallback=byte_fallback, strip_spaces=strip_spaces)


_REPLACEMENTS = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")),
    *((" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)


def clean_up_spaces(text: str) -> str:
    for old, new in _REPLACEMENTS:
        text = text.replace(old, new)
    return text


class IncrementalSpaceCleanup:
    """`clean_up_spaces` of a text that grows: what is given out adds up to the cleaned whole.

    One step for each replacement; a step holds back the end of its text that may begin what it replaces.
    """

    def __init__(self) -> None:
        self._held = [""] * len(_REPLACEMENTS)

    def append(self, text: str) -> str:
        for step, (old, new) in enumerate(_REPLACEMENTS):
            *whole, rest = (self._held[step] + text).split(old)
            begins = next((length for length in range(len(old) - 1, 0, -1) if rest.endswith(old[:length])), 0)
            self._held[step] = rest[len(rest) - begins :]
            text = new.join([*whole, rest[: len(rest) - begins]])
        return text

    def flush(self) -> str:
        """What was held back."""
        text = ""
        for step, (old, new) in enumerate(_REPLACEMENTS):
            text = (self._held[step] + text).replace(old, new)
            self._held[step] = ""
        return text
