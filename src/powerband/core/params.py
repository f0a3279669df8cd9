"""What a request asks of sampling, or of pooling. Names and meanings are vLLM's: scripts move over unchanged."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from powerband.core.structured_outputs import StructuredOutputsParams
from powerband.errors import InvalidRequest

MAX_N = 128  # OpenAI's
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256
MAX_LOGIT_BIAS = 65_536
MAX_STOP_TOKEN_IDS = 1024
MAX_ALLOWED_TOKEN_IDS = 65_536
MAX_BAD_WORDS = 256
MAX_BAD_WORD_BYTES = 256
MAX_BAD_WORD_TOKENS = 4096  # of all bad words together: each step compares them with the output's end
MIN_REPETITION_PENALTY = 0.01  # below, logits divided by it leave float32
GREEDY_BELOW = 1e-5  # a temperature under this is zero
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the next tokens of one request.

    Values are checked here as far as they can be without the model; `check_vocabulary` does the rest.
    Raises InvalidRequest naming the field.
    """

    n: int = 1
    max_tokens: int | None = 16  # None: as many as the context allows (resolved before the engine sees it)
    min_tokens: int = 0  # until then no EOS, stop token or stop string ends the output
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0 or -1: off
    top_p: float = 1.0
    min_p: float = 0.0  # least probability, as a share of the most likely token's
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output only, as is the next
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None
    bad_words_token_ids: list[list[int]] | None = None  # bad_words as token ids, filled in before the engine
    allowed_token_ids: list[int] | None = None
    seed: int | None = None
    stop: list[str] | None = None  # a single string is taken as a list of one
    stop_token_ids: list[int] | None = None
    eos_token_ids: list[int] | None = None  # the model's own, filled in before the engine sees it
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None  # alternatives per output token; the sampled one always comes with them
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    grammar: str | None = None  # structured_outputs as llguidance takes them, filled in before the engine

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", [self.stop])
        _whole("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, _MAX_INT32)
        _whole("min_tokens", self.min_tokens, 0, _MAX_INT32)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}; it must not exceed max_tokens, which is {self.max_tokens}.",
                param="min_tokens",
            )
        self._check_numbers()
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "true or false")
        _strings("stop", self.stop, MAX_STOP_STRINGS, MAX_STOP_BYTES)
        _strings("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_BYTES)
        self._check_token_ids()
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise _wrong("structured_outputs", self.structured_outputs, "StructuredOutputsParams(…)")
        if self.grammar is not None and (not isinstance(self.grammar, str) or not self.grammar):
            raise _wrong("grammar", self.grammar, "a string that is not empty")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def end_token_ids(self) -> list[int]:
        """Tokens that `min_tokens` holds back: stop tokens, and EOS even where it is otherwise ignored."""
        return sorted({*(self.stop_token_ids or ()), *(self.eos_token_ids or ())})

    def for_choice(self, index: int) -> SamplingParams:
        """For one of the n answers to a prompt: n = 1, and seeds in a row, or the answers would all be the same.

        Lists are shared with this object and not checked again, so that an answer more costs nothing.
        """
        seed = None if self.seed is None else (self.seed + index + 2**63) % 2**64 - 2**63
        if self.n == 1 and seed == self.seed:
            return self
        return self.with_seed(seed)

    def with_seed(self, seed: int | None) -> SamplingParams:
        """The same for one answer with this seed. Lists are shared, as in `for_choice`."""
        own = copy.copy(self)
        object.__setattr__(own, "n", 1)
        object.__setattr__(own, "seed", seed)
        return own

    def with_grammar(self, grammar: str) -> SamplingParams:
        """The same, with `structured_outputs` in the form that the engine takes."""
        return replace(self, structured_outputs=None, grammar=grammar)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InvalidRequest when a token id lies outside [0, vocab_size)."""
        named: list[tuple[str, Iterable[int]]] = [
            ("logit_bias", self.logit_bias or ()),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("stop_token_ids", self.stop_token_ids or ()),
            ("bad_words", (id for word in self.bad_words_token_ids or () for id in word)),
        ]
        for name, ids in named:
            wrong = max(ids, default=0)
            if wrong >= vocab_size:
                raise InvalidRequest(
                    f"{name} names token {wrong}; the model's vocabulary ends at {vocab_size - 1}.", param=name
                )

    def with_bad_word_ids(self, encode: Callable[[str], list[int]]) -> SamplingParams:
        """The same, with `bad_words` as token ids: each word as a text begins with it, and after a space.

        `encode` gives token ids without special ones. As in vLLM, the form after a space counts where it is one of as
        many tokens that begins differently. Raises InvalidRequest as soon as they are too many tokens together.
        """
        if not self.bad_words:
            return self
        ids: list[list[int]] = []
        num_tokens = 0
        for word in self.bad_words:
            bare, spaced = encode(word.lstrip()), encode(" " + word.lstrip())
            forms = [bare, spaced] if spaced and spaced[:1] != bare[:1] and len(spaced) == len(bare) else [bare]
            ids += [form for form in forms if form]
            num_tokens += sum(map(len, forms))
            if num_tokens > MAX_BAD_WORD_TOKENS:
                raise _too_many_bad_tokens()
        return replace(self, bad_words_token_ids=ids)

    def _check_numbers(self) -> None:
        _real("temperature", self.temperature, 0, 100)
        _whole("top_k", self.top_k, -1, _MAX_INT32)
        _real("top_p", self.top_p, 0, 1)
        _real("min_p", self.min_p, 0, 1)
        _real("presence_penalty", self.presence_penalty, -2, 2)
        _real("frequency_penalty", self.frequency_penalty, -2, 2)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise _wrong(name, 0, "greater than 0")
        _real("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, 100)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, MAX_LOGPROBS)

    def _check_token_ids(self) -> None:
        _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        _token_ids("eos_token_ids", self.eos_token_ids, MAX_STOP_TOKEN_IDS)
        _token_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise _wrong("allowed_token_ids", [], "left out or not empty, since nothing could be sampled")
        if self.bad_words_token_ids is not None:
            words = _list("bad_words_token_ids", self.bad_words_token_ids, 2 * MAX_BAD_WORDS)
            for i, word in enumerate(words):
                _token_ids(f"bad_words_token_ids.{i}", word, MAX_BAD_WORD_BYTES + 1)
                if not word:
                    raise _wrong(f"bad_words_token_ids.{i}", word, "not empty")
            if sum(map(len, words)) > MAX_BAD_WORD_TOKENS:
                raise _too_many_bad_tokens()
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict):
                raise _wrong("logit_bias", self.logit_bias, "an object from token id to bias")
            if len(self.logit_bias) > MAX_LOGIT_BIAS:
                raise _too_many("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
            for id, bias in self.logit_bias.items():
                _whole("logit_bias", id, 0, _MAX_INT32)
                _real(f"logit_bias.{id}", bias, -100, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """How one prompt becomes a vector. Names are vLLM's. Raises InvalidRequest naming the field.

    What is pooled (last token, mean, …) is the checkpoint's own matter, see spec.model.pooling.
    """

    dimensions: int | None = None  # keep only the first ones; None: all
    use_activation: bool | None = None  # normalise the embedding, or apply the scorer's activation; None: the model's
    second_text_start: int | None = None  # of a pair: the first token of its second text, for models with token types

    def __post_init__(self) -> None:
        if self.dimensions is not None and (type(self.dimensions) is not int or self.dimensions < 1):
            raise InvalidRequest(
                f"dimensions is {self.dimensions!r}; it must be a whole number of at least 1.", param="dimensions"
            )
        if self.use_activation not in (None, True, False):
            raise InvalidRequest(
                f"use_activation is {self.use_activation!r}; it must be true or false.", param="use_activation"
            )


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int:
        raise _wrong(name, value, "a whole number")
    if not low <= value <= high:
        raise _wrong(name, value, f"between {low} and {high}")


def _real(name: str, value: Any, low: float, high: float) -> None:
    if type(value) is not float and type(value) is not int:
        raise _wrong(name, value, "a number")
    if not (low <= value <= high and math.isfinite(value)):
        raise _wrong(name, value, f"between {low} and {high}")


def _list(name: str, values: Any, limit: int) -> list[Any]:
    if not isinstance(values, list):
        raise _wrong(name, values, "a list")
    if len(values) > limit:
        raise _too_many(name, len(values), limit)
    return values


def _strings(name: str, values: Any, limit: int, max_bytes: int) -> None:
    for i, text in enumerate(_list(name, [] if values is None else values, limit)):
        if not isinstance(text, str) or not text:
            raise _wrong(f"{name}.{i}", text, "a string that is not empty")
        num_bytes = len(text.encode("utf-8", "surrogatepass"))
        if num_bytes > max_bytes:
            raise InvalidRequest(f"{name}.{i} has {num_bytes} bytes; the limit is {max_bytes}.", param=f"{name}.{i}")


def _token_ids(name: str, values: Any, limit: int) -> None:
    ids = _list(name, [] if values is None else values, limit)
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) <= _MAX_INT32):
        return
    for i, id in enumerate(ids):  # which one is it?
        _whole(f"{name}.{i}", id, 0, _MAX_INT32)


def _wrong(name: str, value: Any, wanted: str) -> InvalidRequest:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "…"
    return InvalidRequest(f"{name} is {shown}; it must be {wanted}.", param=name)


def _too_many_bad_tokens() -> InvalidRequest:
    return InvalidRequest(
        f"bad_words have more than {MAX_BAD_WORD_TOKENS} tokens together, counting both forms of each (at the "
        "start of a text and after a space).",
        hint="Send fewer or shorter words.",
        param="bad_words",
    )


def _too_many(name: str, count: int, limit: int) -> InvalidRequest:
    return InvalidRequest(f"{name} has {count} entries; the limit is {limit}.", param=name)
