"""Prompts as token ids: from text, from a conversation, or as they were sent; checked against the context length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import msgspec

from powerband.errors import InvalidRequest, RequestTooLong
from powerband.server.generation.reasoning import template_kwargs
from powerband.server.protocol import MAX_PROMPTS, ChatRequest, CompletionRequest, Message, TokenizeRequest
from powerband.server.replica import Model, ServerState
from powerband.text.chat_template import ChatTemplate
from powerband.text.tokenizer import Tokenizer
from powerband.text.tool_messages import check_tool_messages

_LONG_TEXT_CHARS = 4096  # longer texts are encoded in a thread, so that others' tokens go on


@dataclass(slots=True)
class Prompt:
    token_ids: list[int]
    text: str | None = None  # as sent; None when token ids were, or when it may have been cut


async def completion_prompts(replica: ServerState, model: Model, body: CompletionRequest) -> list[Prompt]:
    """The prompts of a completion. Raises InvalidRequest."""
    sources = _split_prompts("" if body.prompt is None else body.prompt)
    num_chars = sum(len(source) for source in sources if isinstance(source, str))
    prompts = []
    for source in sources:
        if isinstance(source, str):
            ids = await encode(
                replica,
                model,
                source,
                body.add_special_tokens is not False,
                body.truncate_prompt_tokens,
                in_thread=num_chars >= _LONG_TEXT_CHARS,
            )
            if not source and not ids:
                ids = _beginning(model)
            cut = body.truncate_prompt_tokens is not None and len(ids) == body.truncate_prompt_tokens
            prompts.append(Prompt(ids, None if cut else source))
        else:
            prompts.append(Prompt(_truncated(source, body.truncate_prompt_tokens)))
    for prompt in prompts:
        check_prompt(prompt.token_ids, model, "prompt")
    return prompts


async def chat_prompt(
    replica: ServerState, model: Model, body: ChatRequest, tools: list[dict[str, Any]] | None = None
) -> Prompt:
    """The conversation in the model's chat template. tools: in the form for templates. Raises InvalidRequest."""
    text = await render(replica, model, body, body.messages, tools, template_kwargs(body, model))
    # Templates write special tokens themselves.
    ids = await encode(replica, model, text, body.add_special_tokens is True, body.truncate_prompt_tokens)
    check_prompt(ids, model, "messages")
    return Prompt(ids, text)


async def render(
    replica: ServerState,
    model: Model,
    body: ChatRequest | TokenizeRequest,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    kwargs: dict[str, Any] | None,
) -> str:
    continues = body.continue_final_message is True
    num_bytes = len(msgspec.json.encode((messages, kwargs, tools)))
    template = model.need_template()
    in_text = model.format.writes_tools_in_text
    if tools and not (template.writes_tools or in_text):
        raise InvalidRequest(
            "This model's chat template does not write tools, so the model would not see them.",
            hint="Leave 'tools' out, or start the server with a template that has them (--chat-template FILE).",
            code="tools_not_supported",
            param="tools",
        )
    async with replica.room_for_text(num_bytes):
        return await replica.in_thread(
            _rendered,
            template,
            [_plain(message, index) for index, message in enumerate(messages)],
            tools=tools,
            add_generation_prompt=not continues if body.add_generation_prompt is None else body.add_generation_prompt,
            continue_final_message=continues,
            template_kwargs=kwargs,
            tools_in_text=in_text,
        )


def _rendered(template: ChatTemplate, messages: list[dict[str, Any]], **options: Any) -> str:
    check_tool_messages(messages)
    return template.render(messages, **options)


async def encode(
    replica: ServerState,
    model: Model,
    text: str,
    add_special_tokens: bool,
    truncate: int | None = None,
    *,
    in_thread: bool = False,
) -> list[int]:
    """Token ids of `text`. A text that is far too long is refused before that. in_thread: for one of many."""
    tokenizer = model.need_tokenizer()
    least = len(text) // _max_token_bytes(tokenizer)
    if least > model.info.max_model_len:  # also where it would be truncated: encoding takes memory first
        raise RequestTooLong(
            f"The prompt has {len(text)} characters, so at least {least} tokens; "
            f"the context holds {model.info.max_model_len}.",
            limit=model.info.max_model_len,
            hint="Shorten the prompt.",
            param="prompt",
        )
    if len(text) < _LONG_TEXT_CHARS and not in_thread:
        ids = tokenizer.encode(text, add_special_tokens)
    else:
        async with replica.room_for_text(len(text)):
            ids = await replica.in_thread(tokenizer.encode, text, add_special_tokens)
    return _truncated(ids, truncate)


def check_prompt(ids: list[int], model: Model, param: str) -> None:
    limit = model.info.max_model_len - 1
    if not ids:
        raise InvalidRequest("The prompt has no tokens.", param=param)
    if len(ids) > limit:
        raise RequestTooLong(
            f"The prompt has {len(ids)} tokens; the context of {limit + 1} tokens takes {limit} and one output token.",
            limit=limit,
            hint="Shorten the prompt, or send truncate_prompt_tokens.",
            param=param,
        )
    worst = max(ids)
    if worst >= model.info.vocab_size or min(ids) < 0:
        wrong = worst if worst >= model.info.vocab_size else min(ids)
        raise InvalidRequest(
            f"The prompt has token {wrong}; the model's vocabulary has tokens 0 to {model.info.vocab_size - 1}.",
            param=param,
        )


def _plain(message: Message, index: int) -> dict[str, Any]:
    if message.content is None and message.role != "assistant":
        param = f"messages.{index}.content"
        raise InvalidRequest(f"'{param}' is missing.", param=param)
    plain: dict[str, Any] = msgspec.to_builtins(message)
    refusal = plain.pop("refusal", None)
    if not (content := plain.get("content") or refusal) and plain.get("tool_calls"):
        plain.pop("content", None)
    else:
        plain["content"] = content or ""  # a model's refusal is its answer
    return plain


def _split_prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """One prompt or several. A list of numbers is one prompt."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("'prompt' is an empty list.", param="prompt")
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [cast(list[int], prompt)]
    texts = cast(list[str | list[int]], prompt)
    if len(kinds) > 1:
        raise InvalidRequest("'prompt' mixes texts, tokens and lists of tokens.", hint="Send one kind.", param="prompt")
    if len(texts) > MAX_PROMPTS:
        raise InvalidRequest(f"'prompt' has {len(texts)} prompts; the limit is {MAX_PROMPTS}.", param="prompt")
    return texts


def _beginning(model: Model) -> list[int]:
    """What stands for an empty text: the token that separates documents, as at OpenAI. Empty where there is none."""
    tokenizer = model.need_tokenizer()
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [] if first is None else [first]


def _truncated(ids: list[int], limit: int | None) -> list[int]:
    return ids if limit is None else ids[-limit:]


@lru_cache(maxsize=4)
def _max_token_bytes(tokenizer: Tokenizer) -> int:
    """Characters of the longest token: no text has fewer tokens than its length over this."""
    return max(max((len(tokenizer.token(id)) for id in range(tokenizer.vocab_size)), default=1), 1)
