"""From a request's fields to the engine's SamplingParams."""

from __future__ import annotations

from typing import Any

from powerband.core.params import SamplingParams
from powerband.errors import InvalidRequest, RequestTooLong
from powerband.server.protocol import ChatRequest, CompletionRequest, GenerationRequest
from powerband.server.replica import Model

# fmt: off
_SAME_NAME = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "bad_words", "allowed_token_ids", "seed", "min_tokens", "stop_token_ids", "ignore_eos",
    "include_stop_str_in_output", "skip_special_tokens", "prompt_logprobs",
)
# fmt: on
_COMPLETION_MAX_TOKENS = 16  # OpenAI's default


def completion_params(body: CompletionRequest, model: Model, max_prompt_tokens: int) -> SamplingParams:
    """Sampling for every prompt of a completion. Raises InvalidRequest naming the field."""
    if body.best_of and body.best_of != (body.n or 1):
        raise InvalidRequest(
            f"'best_of' is {body.best_of} and 'n' is {body.n or 1}; choosing the best of several is not supported.",
            hint="Leave it out.",
            param="best_of",
            code="unsupported_parameter",
        )
    room = model.info.max_model_len - max_prompt_tokens
    max_tokens = _default_max_tokens(body, model, min(_COMPLETION_MAX_TOKENS, room))
    if body.max_tokens is not None:
        max_tokens = body.max_tokens
    if max_tokens == 0:
        max_tokens = 1  # computed to score the prompt, and then left out
    prompt_logprobs = body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs
    return _params(body, model, room, max_tokens, body.logprobs, prompt_logprobs=prompt_logprobs)


def chat_params(body: ChatRequest, model: Model, prompt_tokens: int) -> SamplingParams:
    """Sampling for a chat. Without a limit, also in generation_config.json, the answer may fill the context.

    Raises InvalidRequest naming the field.
    """
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if asked == 0:
        raise InvalidRequest("'max_tokens' is 0; a chat's answer has at least one token.", param="max_tokens")
    if body.max_tokens is not None and asked != body.max_tokens:
        raise InvalidRequest(
            f"max_tokens is {body.max_tokens} and max_completion_tokens is {asked}.",
            hint="They mean the same: send one.",
            param="max_tokens",
        )
    if body.top_logprobs and body.logprobs is not True:
        raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
    room = model.info.max_model_len - prompt_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _params(body, model, room, _default_max_tokens(body, model, room) if asked is None else asked, logprobs)


def _default_max_tokens(body: GenerationRequest, model: Model, limit: int) -> int:
    """For a request without a limit: the checkpoint's, at most what fits, and at least min_tokens."""
    own = int(model.info.sampling_defaults.get("max_tokens", limit))
    return min(limit, max(own, body.min_tokens or 0))


def _params(
    body: GenerationRequest, model: Model, room: int, max_tokens: int, logprobs: int | None, **overrides: Any
) -> SamplingParams:
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest(
            "prompt_logprobs cannot be streamed.", hint="Set stream to false.", param="prompt_logprobs"
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream to be true.", param="stream_options")
    if max_tokens > room:
        raise RequestTooLong(
            f"The context holds {model.info.max_model_len} tokens: {model.info.max_model_len - room} of the prompt "
            f"leave room for {room}, but max_tokens is {max_tokens}.",
            limit=room,
            hint="Lower max_tokens, or leave it out.",
            param="max_tokens",
        )
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    if model.tokenizer is None and (stop or body.bad_words):
        model.need_tokenizer()
    fields: dict[str, Any] = {name: value for name, value in model.info.sampling_defaults.items() if name in _SAME_NAME}
    fields |= {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    fields |= overrides
    if body.top_p == 0:  # the least share that can be kept: the most likely token
        fields |= {"top_p": 1.0, "temperature": 0.0}
    params = SamplingParams(
        **fields,
        n=body.n or 1,
        max_tokens=max_tokens,
        stop=stop,
        logprobs=logprobs,
        eos_token_ids=model.info.eos_token_ids,
    )
    if model.tokenizer is not None:
        encode = model.tokenizer.encode
        params = params.with_bad_word_ids(lambda word: encode(word, add_special_tokens=False))
    params.check_vocabulary(model.info.vocab_size)
    return params
