"""Texts to pool, as token ids: with the checkpoint's prompt before them, cut where that is asked for, and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from powerband.errors import InvalidRequest, RequestTooLong
from powerband.server.pooling.protocol import MAX_INPUTS, EmbeddingRequest
from powerband.server.replica import Model, ServerState
from powerband.spec.model.pooling import SIDES, PoolingSpec
from powerband.spec.settings import EngineSettings

Source = TypeVar("Source")
Tokens = TypeVar("Tokens")
_LONG_TEXT_CHARS = 4096  # more than these in all are encoded in a thread, so that others' tokens go on


def prompt_text(pooling: PoolingSpec, body: EmbeddingRequest) -> str:
    """What goes before each text. Raises InvalidRequest for a prompt that the checkpoint lacks."""
    if body.input_type is None:
        return pooling.prompt(body.prompt_name)
    if body.prompt_name is not None:
        raise InvalidRequest("'prompt_name' and 'input_type' both choose a prompt.", param="input_type")
    if body.input_type in SIDES and body.input_type not in dict(pooling.prompts):
        return pooling.side_prompt(body.input_type)
    return pooling.prompt(body.input_type, "input_type")


async def input_tokens(
    replica: ServerState, model: Model, pooling: PoolingSpec, body: EmbeddingRequest
) -> list[list[int]]:
    """The token ids of each input. Raises InvalidRequest or RequestTooLong, naming the input."""
    texts, tokens = _split(body.input)
    cut = cut_at(model, body.truncate_prompt_tokens)
    prompt = prompt_text(pooling, body)
    if texts:
        texts = [prompt + text for text in texts]
        special = body.add_special_tokens is not False
        tokens = await encode_texts(replica, model, pooling, texts, cut=cut, add_special_tokens=special)
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


async def encode_texts(
    replica: ServerState,
    model: Model,
    pooling: PoolingSpec,
    texts: list[str],
    *,
    cut: int | None,
    add_special_tokens: bool = True,
) -> list[list[int]]:
    """The token ids of each text, at most `cut`."""
    encode = model.need_tokenizer().encode
    if pooling.lowercase:
        texts = [text.lower() for text in texts]
    return await _map(replica, lambda text: encode(text, add_special_tokens, max_tokens=cut), texts, len)


async def encode_pairs(
    replica: ServerState, model: Model, pairs: list[tuple[str, str]], cut: int | None
) -> list[tuple[list[int], int | None]]:
    """As Tokenizer.encode_pair, of each pair."""
    encode = model.need_tokenizer().encode_pair
    return await _map(replica, lambda pair: encode(*pair, max_tokens=cut), pairs, lambda pair: len(pair[0] + pair[1]))


async def _map(
    replica: ServerState, encode: Callable[[Source], Tokens], sources: list[Source], size: Callable[[Source], int]
) -> list[Tokens]:
    """Encode all: few characters at once, many in a thread."""
    num_chars = sum(map(size, sources))
    if num_chars < _LONG_TEXT_CHARS:
        return [encode(source) for source in sources]
    async with replica.room_for_text(num_chars):
        return await replica.in_thread(lambda: [encode(source) for source in sources])
