"""Compiled grammars, kept by content. A grammar is llguidance's: Lark's syntax, or JSON with several grammars."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from powerband.core.request import OUTPUT_COMPLETE
from powerband.errors import InvalidRequest

MAX_GRAMMAR_BYTES = 1 << 20
_MAX_KEPT_BYTES = 16 << 20  # of the grammars' texts; compiled, they take some ten times as much
_MAX_KEPT = 256
# A step's mask takes some 5 ms at most by these units of work, for 15 by default. Errors do not repeat the grammar.
_LIMITS = LLParserLimits(step_lexer_fuel=70_000, step_max_items=50_000, verbose_errors=False)


def compile_grammar(tokens: LLTokenizer, grammar: str) -> LLMatcher:
    """Takes milliseconds, and for a hostile grammar seconds and much memory. Raises InvalidRequest."""
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise bad_grammar(f"it has more than {MAX_GRAMMAR_BYTES} characters")
    matcher = LLMatcher(tokens, grammar, limits=_LIMITS, log_level=0)
    if matcher.is_error():
        raise bad_grammar(reason(matcher))
    return matcher


class Grammars:
    """Matchers for requests. Threads may share it; `load` is called once, when the first grammar comes."""

    def __init__(self, load: Callable[[], LLTokenizer]) -> None:
        self._load = load
        self._tokens: LLTokenizer | None = None
        self._loading = threading.Lock()
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def tokens(self) -> LLTokenizer:
        """Raises InvalidRequest for a tokenizer with which there are no grammars."""
        with self._loading:
            if self._tokens is None:
                self._tokens = self._load()
            return self._tokens

    def has(self, grammar: str) -> bool:
        """Whether `matcher` would not have to compile it."""
        with self._lock:
            return grammar in self._kept

    def prepare(self, grammar: str) -> None:
        """Compile it, unless that is done. Raises InvalidRequest."""
        if self.has(grammar):
            return
        compiled = compile_grammar(self.tokens, grammar)
        with self._lock:
            if grammar not in self._kept:
                self._kept[grammar] = compiled
                self._num_bytes += len(grammar)
            while len(self._kept) > 1 and (len(self._kept) > _MAX_KEPT or self._num_bytes > _MAX_KEPT_BYTES):
                dropped, _ = self._kept.popitem(last=False)
                self._num_bytes -= len(dropped)

    def matcher(self, grammar: str, output: Sequence[int] = ()) -> LLMatcher:
        """A matcher of one request that has this output already. Raises InvalidRequest where that does not fit."""
        self.prepare(grammar)
        with self._lock:
            self._kept.move_to_end(grammar)
            matcher = self._kept[grammar].deep_copy()
        if output and not matcher.consume_tokens(list(output)):
            raise InvalidRequest(
                "The tokens to be resumed do not have the form that the request asks for.", param="resume_token_ids"
            )
        if output and matcher.is_stopped():
            raise InvalidRequest(
                "The tokens to be resumed are a complete answer of the form that the request asks for.",
                param="resume_token_ids",
                code=OUTPUT_COMPLETE,
            )
        return matcher


def bad_grammar(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"The form of the answer cannot be compiled: {why}.",
        hint="docs/structured-output.md says what is supported.",
        code="invalid_grammar",
        param="structured_outputs",
    )


def reason(matcher: LLMatcher) -> str:
    """Why a matcher is in error, in one line."""
    text = matcher.get_error().replace("<non-verbose/>", "")
    return (" ".join(text.split()) or "the reason is unknown")[:500].rstrip(".")
