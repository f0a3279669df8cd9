"""Texts to pool, as token ids: with the checkpoint's prompt before them, cut where that is asked for, and checked."""

from __future__ import annotations

from collections.abc import Sequence

from powerband.errors import InvalidRequest, RequestTooLong
from powerband.server.pooling.protocol import MAX_INPUTS, EmbeddingRequest
from powerband.server.replica import Model, ServerState
from powerband.spec.model.pooling import PoolingSpec
from powerband.spec.settings import EngineSettings
from powerband.text.tokenizer import Tokenizer

_LONG_TEXT_CHARS = 4096  # more than these in all are encoded in a thread, so that others' tokens go on
# What other APIs (Cohere, Voyage, NVIDIA) call the two sides of a search, and the prompts that sentence-transformers
# looks for.
_SIDES = {
    "query": ("query",),
    "search_query": ("query",),
    "document": ("document", "passage", "corpus"),
    "passage": ("document", "passage", "corpus"),
    "search_document": ("document", "passage", "corpus"),
}


def prompt_text(pooling: PoolingSpec, body: EmbeddingRequest) -> str:
    """What goes before each text. Raises InvalidRequest for a prompt that the checkpoint lacks."""
    prompts = dict(pooling.prompts)
    if body.prompt_name is not None and body.input_type is not None:
        raise InvalidRequest("'prompt_name' and 'input_type' both choose a prompt.", param="input_type")
    name = body.prompt_name if body.input_type is None else body.input_type
    if name is None:
        return prompts[pooling.default_prompt] if pooling.default_prompt is not None else ""
    if name in prompts:
        return prompts[name]
    if body.input_type in _SIDES:
        return next((prompts[side] for side in _SIDES[body.input_type] if side in prompts), "")
    field = "prompt_name" if body.input_type is None else "input_type"
    known = ", ".join(sorted(prompts)) or "no prompts"
    raise InvalidRequest(f"'{field}' is {name[:60]!r}; the checkpoint has {known}.", param=field)


async def input_tokens(
    replica: ServerState, model: Model, pooling: PoolingSpec, body: EmbeddingRequest
) -> list[list[int]]:
    """The token ids of each input. Raises InvalidRequest or RequestTooLong, naming the input."""
    texts, tokens = _split(body.input)
    cut = cut_at(model, body.truncate_prompt_tokens)
    prompt = prompt_text(pooling, body)
    if texts:
        texts = [(prompt + text).lower() if pooling.lowercase else prompt + text for text in texts]
        tokens = await _encode(replica, model, texts, body.add_special_tokens is not False, cut)
    elif cut is not None:
        tokens = [ids[:cut] for ids in tokens]
    for index, ids in enumerate(tokens):
        check_tokens(ids, model, f"input.{index}" if len(tokens) > 1 else "input")
    check_total(tokens, replica.engine_settings, "input")
    return tokens


def cut_at(model: Model, truncate: int | None) -> int | None:
    """How many tokens of a text to keep; None: all."""
    if truncate is None:
        return None
    limit = model.info.max_model_len
    return limit if truncate == -1 else min(truncate, limit)


def check_tokens(ids: Sequence[int], model: Model, param: str) -> None:
    """Raises InvalidRequest or RequestTooLong for a prompt that the model cannot take."""
    info = model.info
    if not ids:
        raise InvalidRequest(f"'{param}' has no tokens.", param=param)
    if len(ids) > info.max_model_len:
        raise RequestTooLong(
            f"'{param}' has {len(ids)} tokens; the model takes {info.max_model_len}.",
            limit=info.max_model_len,
            hint="Shorten it, or send truncate_prompt_tokens: -1.",
            param=param,
        )
    worst = max(ids)
    if worst >= info.vocab_size or min(ids) < 0:
        wrong = worst if worst >= info.vocab_size else min(ids)
        raise InvalidRequest(
            f"'{param}' has token {wrong}; the model's vocabulary has tokens 0 to {info.vocab_size - 1}.", param=param
        )


def check_total(tokens: Sequence[Sequence[int]], settings: EngineSettings, param: str) -> None:
    total = sum(map(len, tokens))
    if len(tokens) > 1 and total > settings.max_num_queued_tokens:
        raise InvalidRequest(
            f"All of '{param}' has {total} tokens; one request may have {settings.max_num_queued_tokens}.",
            hint="Send it in parts.",
            param=param,
        )


def _split(source: str | list[str | int | list[int]]) -> tuple[list[str], list[list[int]]]:
    """The inputs: all texts, or all token ids. A list of numbers is one input."""
    items = [source] if isinstance(source, str) else source
    texts = [item for item in items if isinstance(item, str)]
    lists = [item for item in items if isinstance(item, list)]
    numbers = [item for item in items if isinstance(item, int)]
    if not items:
        raise InvalidRequest("'input' is an empty list.", param="input")
    if sum(map(bool, (texts, lists, numbers))) > 1:
        raise InvalidRequest("'input' mixes texts, tokens and lists of tokens.", hint="Send one kind.", param="input")
    if not numbers and len(items) > MAX_INPUTS:
        raise InvalidRequest(
            f"'input' has {len(items)} inputs; the limit is {MAX_INPUTS}.", hint="Send it in parts.", param="input"
        )
    return texts, [numbers] if numbers else lists


async def _encode(
    replica: ServerState, model: Model, texts: list[str], add_special_tokens: bool, cut: int | None
) -> list[list[int]]:
    tokenizer = model.need_tokenizer()
    num_chars = sum(map(len, texts))
    if num_chars < _LONG_TEXT_CHARS:
        return _encode_all(tokenizer, texts, add_special_tokens, cut)
    async with replica.room_for_text(num_chars):
        return await replica.in_thread(_encode_all, tokenizer, texts, add_special_tokens, cut)


def _encode_all(tokenizer: Tokenizer, texts: list[str], add_special_tokens: bool, cut: int | None) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens, max_tokens=cut) for text in texts]
