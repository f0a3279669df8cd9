"""Before a load: is the server there, which model has it, what is it, and how long do our words become on it?"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from powerband.bench.client.http import get, post
from powerband.bench.client.messages import Endpoint, RequestMessage, SegmentMessage, ServerAddress
from powerband.bench.client.prompts import ONE_TOKEN_A_WORD, ConversationPrompts, PromptMaker
from powerband.bench.client.responses import error_text
from powerband.engines.registry import find_by_owner
from powerband.errors import EnvironmentFault, UsageError
from powerband.http_client.request import Response
from powerband.openai.fields import ListedModel, read_models

_PROBE_TOKENS = (32, 288)
_MIN_PROBED_LEN = 64  # tokens of context; what is shorter is not probed


@dataclass(frozen=True, slots=True)
class ServerInfo:
    kind: str  # the name of an engine in engines/; 'unknown'
    version: str
    max_model_len: int | None


async def find_server(target: ServerAddress, wait_s: float = 0.0) -> tuple[ServerAddress, ServerInfo]:
    """The target with the model's name filled in, and what serves it. wait_s: how long to wait for a server that is not
    there yet. Raises EnvironmentFault when none answers, UsageError for a model that it does not have.
    """
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            page = await get(target, "/v1/models")
            if page.status == 200 or time.monotonic() >= deadline_s:
                break
        except (OSError, TimeoutError) as problem:
            if time.monotonic() >= deadline_s:
                hint = "Start one ('powerband serve demo'), or give the address of one that runs."
                if "certificate" in str(problem):
                    hint = "Name its CA's certificate in SSL_CERT_FILE, or skip the check with --insecure."
                raise EnvironmentFault(
                    f"No server answers at {target.base}: {problem or 'it is silent'}.",
                    hint=hint,
                    code="no_server",
                ) from None
        await asyncio.sleep(0.5)
    if page.status in (401, 403):
        raise UsageError(
            f"{target.base} refuses: {error_text(page.body)}", hint="Give its key with --api-key.", param="api_key"
        )
    listed = read_models(page.body) if page.status == 200 else []
    names = [one.id for one in listed]
    model = target.model or (names[0] if names else "")
    if not model:
        raise UsageError(f"{target.base} does not say which model it has.", hint="Name it with --model.", param="model")
    if names and model not in names:
        raise UsageError(f"{target.base} has no model '{model}'.", hint=f"It has: {', '.join(names)}.", param="model")
    card = listed[names.index(model)] if names else ListedModel(model)
    return msgspec.structs.replace(target, model=model), await _identify(target, card)


async def calibrate_prompt_words(target: ServerAddress) -> ServerAddress:
    """With how many of our words make a token on this server, and how many it adds, from two short requests.

    Raises EnvironmentFault when it cannot answer them.
    """
    plain = msgspec.structs.replace(target, words_per_token=1.0)
    maker, counts = PromptMaker(), []
    room = target.max_model_len or _PROBE_TOKENS[1] * 2
    if room < _MIN_PROBED_LEN:
        return target
    lengths = _PROBE_TOKENS[0] // (4 if room < _PROBE_TOKENS[1] else 1), min(_PROBE_TOKENS[1], room // 4)
    for tokens in lengths:
        planned = RequestMessage(0, (SegmentMessage(f"probe {tokens} {time.time_ns()}", tokens),), 1, 0, 0.0)
        body = msgspec.json.decode(ConversationPrompts(plain, maker).body(planned)) | {"stream": False}
        body.pop("stream_options", None)
        try:
            page = await post(target, target.path, body)
        except (OSError, TimeoutError) as problem:
            raise _silent(target, str(problem) or "it is silent") from None
        if page.status != 200:
            raise _silent(target, f"HTTP {page.status}: {error_text(page.body)}")
        counts.append(_prompt_tokens(page))
    short, long = counts
    if not short or not long or long <= short:
        return target  # it does not tell
    tokens_per_word = (long - short) / (lengths[1] - lengths[0])
    if abs(tokens_per_word - 1) < ONE_TOKEN_A_WORD:  # but for the first word, which may be several
        tokens_per_word = 1.0
    extra = max(math.ceil(short - lengths[0] * tokens_per_word), 0)
    return msgspec.structs.replace(target, words_per_token=1 / tokens_per_word, extra_prompt_tokens=extra)


def parse_headers(texts: Iterable[str]) -> dict[str, str]:
    """Of 'Name: value' each. Raises UsageError."""
    headers = {}
    for text in texts:
        name, sign, value = text.partition(":")
        if not sign or not name.strip() or any(mark in text for mark in "\r\n"):
            raise UsageError(f"'{name}' is not a valid header.", hint="Write it like 'Name: value'.", param="header")
        headers[name.strip()] = value.strip()
    return headers


def parse_endpoint(endpoint: str | None, backend: str | None = None) -> Endpoint:
    """Also a path, and what vLLM and GuideLLM call a backend. Raises UsageError for what is unknown or contradicts."""
    named, meant = _endpoint(endpoint, "endpoint"), _endpoint(backend, "backend")
    # vLLM's backends 'vllm' and 'openai' are completions only where no endpoint is named.
    if named and meant == "chat" and named != meant:
        raise UsageError(
            f"The backend '{backend}' and the endpoint '{endpoint}' contradict each other.", param="backend"
        )
    return named or meant or "completions"


def _endpoint(text: str | None, param: str) -> Endpoint | None:
    if text is None:
        return None
    match text.strip("/").removeprefix("v1/").replace("_", "-"):
        case "completions" | "text-completions" | "openai" | "vllm" | "openai-completions":
            return "completions"
        case "chat" | "chat/completions" | "chat-completions" | "openai-chat":
            return "chat"
        case "openai-http":
            return None
    raise UsageError(f"Unknown {param} '{text}'.", hint="There are: completions, chat.", param=param)


def _prompt_tokens(page: Response) -> int:
    answer = page.json()
    usage = answer.get("usage") if isinstance(answer, dict) else None
    return int(usage.get("prompt_tokens") or 0) if isinstance(usage, dict) else 0


async def _identify(target: ServerAddress, card: ListedModel) -> ServerInfo:
    engine = find_by_owner(card.owned_by or "")
    version = ""
    try:
        page = await get(target, "/version")
        body = page.json()
        if page.status == 200 and isinstance(body, dict):
            version = str(body.get("version", ""))
    except (OSError, TimeoutError):
        pass
    name = "unknown" if engine is None else engine.name
    context = card.context_length
    if context is None and name == "llamacpp":
        context = await _llamacpp_context(target)
    return ServerInfo(name, version, context)


async def _llamacpp_context(target: ServerAddress) -> int | None:
    """What llama.cpp's server gives each request, which its list of models does not say."""
    try:
        page: Any = (await get(target, "/props")).json()
        context = page["default_generation_settings"]["n_ctx"]
    except (OSError, TimeoutError, KeyError, TypeError, ValueError):
        return None
    return context if isinstance(context, int) and context > 0 else None


def _silent(target: ServerAddress, why: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"{target.base}{target.path} did not answer a short request: {why.rstrip('.')}.",
        hint="Does it serve this endpoint (--endpoint chat or completions), and is it ready?",
        code="no_answer",
    )
