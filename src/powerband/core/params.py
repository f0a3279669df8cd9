"""What a request asks of sampling. Names and meanings are vLLM's, so that scripts move over unchanged."""

from __future__ import annotations

from dataclasses import dataclass

from powerband.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_N = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the next tokens of one request.

    Values are checked here as far as they can be without the model; `check_vocabulary` does the rest.
    Raises InvalidRequest naming the field.
    """

    n: int = 1
    max_tokens: int | None = 16  # None: as many as the context allows (resolved before the engine sees it)
    min_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0 or -1: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None
    bad_words_token_ids: list[list[int]] | None = None  # bad_words as token ids, filled in before the engine
    allowed_token_ids: list[int] | None = None
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    eos_token_ids: list[int] | None = None  # the model's own, filled in before the engine sees it
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None  # alternatives per output token; the sampled one always comes with them
    prompt_logprobs: int | None = None
