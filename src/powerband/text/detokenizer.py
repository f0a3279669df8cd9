"""Text of a growing output, token by token, never in half characters."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from powerband.text.pieces import IncrementalSpaceCleanup
from powerband.text.tokenizer import Tokenizer

# A character has at most four bytes, so no more than this many tokens can share one with the output.
_CONTEXT_TOKENS = 8
# Special tokens in a row: a prompt may consist of nothing else, and each of its answers looks for the context.
_MAX_CONTEXT_SEARCH = 256
# Tokens after which text that still looks incomplete is given out as it is.
_MAX_HELD_TOKENS = 16


class IncrementalDetokenizer:
    """Turns token ids into text as they come. The deltas and `flush()` add up to the text of the whole output.

    Where tokens have bytes (see pieces.py) they run through an incremental UTF-8 decoder: at most three bytes are ever
    held back, and invalid ones become U+FFFD at once. Other decoders are asked for the text of a short moving window.
    Where the tokenizer cleans up spaces, those that may lie before punctuation wait for what follows.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        kept_ids: Collection[int] = (),
    ) -> None:
        """kept_ids: special tokens that are text all the same."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids.difference(kept_ids) if skip_special_tokens else frozenset()
        context = self._context(prompt_ids)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = not context
        if tokenizer.rules is not None:
            self._utf8.decode(b"".join(map(tokenizer.token_bytes, context)))
            self._spaces_to_strip = tokenizer.rules.strip_spaces if self._at_start else 0
        self._window = context
        self._given = tokenizer.decode_part(context, skip_special_tokens=False) if tokenizer.rules is None else ""
        self._num_given = len(context)
        self._cleanup = IncrementalSpaceCleanup() if tokenizer.cleans_up_spaces else None

    def append(self, ids: Sequence[int]) -> str:
        """The text that these further tokens complete."""
        text = self._append(ids)
        return text if self._cleanup is None else self._cleanup.append(text)

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        text = self._flush()
        return text if self._cleanup is None else self._cleanup.append(text) + self._cleanup.flush()

    def _append(self, ids: Sequence[int]) -> str:
        kept = [id for id in ids if id not in self._skipped]
        if not kept:
            return ""
        if self._tokenizer.rules is None:
            return "".join(self._append_to_window(id) for id in kept)
        data = b"".join(map(self._tokenizer.token_bytes, kept))
        if self._at_start:
            data = self._without_leading_spaces(kept, data)
        return self._utf8.decode(data)

    def _flush(self) -> str:
        if self._tokenizer.rules is not None:
            return self._utf8.decode(b"", final=True)
        text = self._tokenizer.decode_part(self._window, skip_special_tokens=False)
        return text[len(self._given) :]

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt that stand for something, if there are any near its end."""
        context: list[int] = []
        for id in reversed(prompt_ids[-_MAX_CONTEXT_SEARCH:]):
            if id not in self._skipped and self._tokenizer.token_bytes(id):
                context.append(id)
                if len(context) == _CONTEXT_TOKENS:
                    break
        return context[::-1]

    def _without_leading_spaces(self, ids: list[int], data: bytes) -> bytes:
        """SentencePiece begins a text with a space that is not part of it."""
        rules = self._tokenizer.rules
        if rules is not None and rules.drop_first_spaces:
            first = next((piece for piece in map(self._tokenizer.token_bytes, ids) if piece), b"")
            self._at_start = not first
            return first.replace(b" ", b"") + data[len(first) :]
        while self._spaces_to_strip and data.startswith(b" "):
            data = data[1:]
            self._spaces_to_strip -= 1
        self._at_start = not data and self._spaces_to_strip > 0
        return data

    def _append_to_window(self, id: int) -> str:
        """Decode the tokens given last together with those not given yet; what is new at the end is the delta."""
        self._window.append(id)
        text = self._tokenizer.decode_part(self._window, skip_special_tokens=False)
        held = len(self._window) - self._num_given
        incomplete = text.endswith("\ufffd") or len(text) <= len(self._given)
        if incomplete and held < _MAX_HELD_TOKENS:
            return ""
        delta = text[len(self._given) :]
        self._window = self._window[self._num_given :]
        self._num_given = len(self._window)
        self._given = self._tokenizer.decode_part(self._window, skip_special_tokens=False)
        return delta
