"""Log-probabilities in the three forms that the APIs have for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import msgspec

from powerband.core.step import TokenLogprobs
from powerband.server.replies import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    RankedToken,
    TokenLogprob,
    TopLogprob,
)
from powerband.text.detokenizer import IncrementalDetokenizer
from powerband.text.tokenizer import Tokenizer

T = TypeVar("T")
_LOWEST = -9999.0  # replaces minus infinity, which JSON does not have


class LogprobWriter:
    """Writes the tokens of one choice, in order; remembers where in the answer's text each of them begins.

    The alternatives of a token are kept as JSON: as objects they would take many times the memory.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: Sequence[int] = (), skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._text = IncrementalDetokenizer(tokenizer, prompt_ids, skip_special) if tokenizer else None
        self._offset = 0

    def skip(self, token_ids: Sequence[int]) -> None:
        """Skip output that was written elsewhere: offsets continue after its text."""
        self._offset += len(self._text.append(token_ids)) if self._text else 0

    def chat(self, rows: Sequence[TokenLogprobs]) -> ChatLogprobs:
        return ChatLogprobs([_as_json(self._chat_token(row)) for row in rows])

    def completion(self, rows: Sequence[TokenLogprobs], into: CompletionLogprobs | None = None) -> CompletionLogprobs:
        written = into or CompletionLogprobs()
        for row in rows:
            alternatives = dict(zip(row.token_ids[1:], row.logprobs[1:], strict=True))
            alternatives.setdefault(row.token_ids[0], row.logprobs[0])
            self._add(written, row.token_ids[0], _finite(row.logprobs[0]), alternatives)
        return written

    def first_of_prompt(self, token_id: int) -> CompletionLogprobs:
        """The prompt's first token, which nothing predicts; `completion` writes the others."""
        written = CompletionLogprobs()
        self._add(written, token_id, None, None)
        return written

    def prompt(self, rows: Sequence[TokenLogprobs]) -> PromptLogprobs:
        """vLLM's form: per position, by token id, with ranks."""
        positions: PromptLogprobs = []
        for row in rows:
            ranked = {
                id: RankedToken(_finite(logprob), rank, self._text_of(id))
                for rank, (id, logprob) in enumerate(zip(row.token_ids[1:], row.logprobs[1:], strict=True), start=1)
            }
            ranked[row.token_ids[0]] = RankedToken(_finite(row.logprobs[0]), row.rank, self._text_of(row.token_ids[0]))
            positions.append(_as_json(ranked))
        return positions

    def _add(
        self, written: CompletionLogprobs, id: int, logprob: float | None, alternatives: dict[int, float] | None
    ) -> None:
        written.tokens.append(self._text_of(id))
        written.token_logprobs.append(logprob)
        written.top_logprobs.append(
            None
            if alternatives is None
            else _as_json({self._text_of(i): _finite(value) for i, value in alternatives.items()})
        )
        written.text_offset.append(self._offset)
        self._offset += len(self._text.append([id])) if self._text else 0

    def _chat_token(self, row: TokenLogprobs) -> TokenLogprob:
        tops = [
            TopLogprob(self._text_of(id), _finite(logprob), self._bytes_of(id))
            for id, logprob in zip(row.token_ids[1:], row.logprobs[1:], strict=True)
        ]
        id = row.token_ids[0]
        return TokenLogprob(self._text_of(id), _finite(row.logprobs[0]), self._bytes_of(id), tops)

    def _text_of(self, id: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{id}"
        return self._tokenizer.token_bytes(id).decode("utf-8", "replace")

    def _bytes_of(self, id: int) -> list[int] | None:
        return None if self._tokenizer is None else list(self._tokenizer.token_bytes(id))


def _as_json(value: T) -> T:
    """JSON that is written as it is, in place of `value`."""
    return cast(T, msgspec.Raw(msgspec.json.encode(value)))


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
