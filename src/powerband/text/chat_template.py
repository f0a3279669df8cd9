"""From a conversation to the prompt that the model was trained on, by the checkpoint's own Jinja template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from powerband.documents import read_bytes
from powerband.errors import EnvironmentFault, InvalidRequest, PowerbandError, UsageError
from powerband.text.template_process import TemplateProcesses
from powerband.text.tokenizer import Tokenizer
from powerband.text.tool_messages import tools_as_text
from powerband.worker_process import WorkerLimits

_MAX_TEMPLATE_BYTES = 1 << 20
_MAX_TEXT_CHARS = 1 << 20  # beyond eight times the input
_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
# fmt: off
_RESERVED_NAMES = frozenset((
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception",
    "strftime_now", "namespace", "dict", "range", "lipsum", "cycler", "joiner", "loop", "self", "super", "varargs",
    "kwargs", "caller", "true", "false", "none", "True", "False", "None",
))
# fmt: on


class ChatTemplate:
    """The templates of one checkpoint, rendered in bounded worker processes. Threads may share it.

    `templates` maps names to Jinja sources; "default" must be there, "tool_use" is taken when a request has tools.
    `variables` are what every rendering sees besides the request: bos_token, eos_token, …
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        variables: Mapping[str, str] | None = None,
        limits: WorkerLimits | None = None,
    ) -> None:
        for name, source in templates.items():
            try:
                num_bytes = len(source.encode())
            except UnicodeEncodeError:
                raise _invalid(f"The chat template '{name}' has half of a surrogate pair.") from None
            if num_bytes > _MAX_TEMPLATE_BYTES:
                raise _invalid(f"The chat template '{name}' is larger than {_MAX_TEMPLATE_BYTES} bytes.")
        self._sources = dict(templates)
        self._variables = dict(variables or {})
        self._reads_reasoning, self._reads_thinking = map(self._has_field, ("reasoning", "thinking"))
        self._processes = TemplateProcesses(self._sources, self._variables, limits or WorkerLimits())

    @property
    def source(self) -> str:
        """Of the templates that are rendered, with and without tools."""
        return "\n".join(self._sources[name] for name in ("default", "tool_use") if name in self._sources)

    @property
    def writes_tools(self) -> bool:
        """Whether the model gets to see the tools of a request."""
        reads = self._processes.reads
        return bool(reads["tool_use" if "tool_use" in self._sources else "default"]["tools"])

    def has_variable(self, name: str) -> bool:
        """Whether the template reads a variable, such as enable_thinking."""
        return re.search(rf"(?<![\w.'\"]){re.escape(name)}(?![\w'\"])", self.source) is not None

    def _has_field(self, name: str) -> bool:
        """Whether the template reads a field of messages."""
        return re.search(rf"[.'\"]{re.escape(name)}(?!\w)", self.source) is not None

    @classmethod
    def load(
        cls, tokenizer: Tokenizer, file: str | Path | None = None, limits: WorkerLimits | None = None
    ) -> ChatTemplate | None:
        """The template in `file`, else the checkpoint's own. None when it has none."""
        sources = {"default": _read(Path(file), allows_pipes=True)} if file else _checkpoint_templates(tokenizer)
        return cls(sources, tokenizer.special_tokens, limits) if sources else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        tools_in_text: bool = False,
    ) -> str:
        """The prompt as text; encode it with add_special_tokens=False, because templates write BOS themselves.

        Content is given to the template in a form that it reads: text, or parts. A "developer" is a "system" where the
        template does not know that role. A message of which nothing is in the prompt is an error.

        tools_in_text: a template that does not write tools gets them, their calls and results as text of messages.

        Blocks for about 0.3 ms, at worst a little over the time limit: call it outside an event loop.
        Raises InvalidRequest (param "messages", "chat_template_kwargs", …).
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other.",
                hint="Set add_generation_prompt to false.",
                param="continue_final_message",
            )
        if tools_in_text and not self.writes_tools:
            messages, tools = tools_as_text(messages, tools), None
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        reads = self._processes.reads[name]
        chat = [_plain_message(message, index, reads) for index, message in enumerate(messages)]
        for message in chat:
            self._name_reasoning(message)
        if continue_final_message:
            _mark_end(chat)
        context = {
            **self._variables,
            **_checked_kwargs(template_kwargs or {}, self._variables),
            "messages": chat,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            num_bytes = len(msgspec.json.encode(context))
        except UnicodeEncodeError:
            raise InvalidRequest(
                "The messages have half a surrogate pair, which is not valid text.", param="messages"
            ) from None
        except (TypeError, NotImplementedError) as error:
            raise InvalidRequest(
                f"The messages, or the tools, hold what JSON cannot: {error}.", param="messages"
            ) from None
        text, left_out = self._processes.render(name, context, _MAX_TEXT_CHARS + 8 * num_bytes)
        if left_out is not None:
            raise _left_out(messages, *left_out)
        return _cut_at_mark(text) if continue_final_message else text

    def _name_reasoning(self, message: dict[str, Any]) -> None:
        """Give reasoning under the names that the template has for it. gpt-oss' takes it or content, not both."""
        if (text := message.get("reasoning_content")) is None:
            return
        if self._reads_reasoning:
            message["reasoning"] = text
        if self._reads_thinking and not message["content"]:
            message["thinking"] = text

    def close(self) -> None:
        """End the worker processes."""
        self._processes.close()


def _checkpoint_templates(tokenizer: Tokenizer) -> dict[str, str]:
    """chat_template.jinja and additional_chat_templates/, else "chat_template" of tokenizer_config.json."""
    main = tokenizer.folder / "chat_template.jinja"
    if main.exists():
        others = sorted(filter(Path.is_file, (tokenizer.folder / "additional_chat_templates").glob("*.jinja")))
        return {"default": _read(main)} | {file.stem: _read(file) for file in others}
    found = tokenizer.config.get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    if found is None:
        return {}
    if isinstance(found, dict):
        found = [{"name": name, "template": template} for name, template in found.items()]
    if not isinstance(found, list) or not all(map(_is_named_template, found)):
        raise _invalid(
            "'chat_template' in tokenizer_config.json is neither a string nor a list of objects with 'name' and"
            " 'template', which are strings."
        )
    named = {item["name"]: item["template"] for item in found}
    if named and "default" not in named:
        raise EnvironmentFault(
            f"The checkpoint has chat templates named {', '.join(sorted(named))}, but none named default.",
            hint="Choose one: save it to a file and give --chat-template FILE.",
            code="chat_template_invalid",
        )
    return named


def _is_named_template(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("name", "template"))


def _invalid(problem: str) -> EnvironmentFault:
    return EnvironmentFault(problem, hint="Give another with --chat-template FILE.", code="chat_template_invalid")


def _read(file: Path, *, allows_pipes: bool = False) -> str:
    try:
        content = read_bytes(file, "chat template", max_bytes=_MAX_TEMPLATE_BYTES, allows_pipes=allows_pipes).decode()
    except (EnvironmentFault, UsageError, UnicodeDecodeError) as error:
        reason = error.message if isinstance(error, PowerbandError) else f"{error}."
        raise EnvironmentFault(
            f"The chat template {file} cannot be read: {reason}",
            hint="Give the path of a text file in UTF-8.",
            code="chat_template_invalid",
        ) from error
    return content.replace("\r\n", "\n").replace("\r", "\n")


def _plain_message(message: Mapping[str, Any], index: int, reads: Mapping[str, Any]) -> dict[str, Any]:
    """A message as the template expects it: role and content in the form that it reads, tool arguments as objects.

    Clients send back the answers that they got, fields that are null or empty included. Templates would take
    `"tool_calls": []` for a call, and write null content as "None".
    """
    plain = {key: value for key, value in message.items() if value is not None and (key, value) != ("tool_calls", [])}
    plain.setdefault("content", None if "tool_calls" in plain else "")
    if plain.get("role") == "developer" and not reads["developer"] and reads["forms"]["system"]:
        plain["role"] = "system"
    forms = reads["forms"].get(plain.get("role"), reads["forms"]["user"])
    content = plain.get("content")
    if isinstance(content, list):
        texts = [_text_of_part(part, f"messages.{index}.content.{i}") for i, part in enumerate(content)]
        plain["content"] = _in_form(texts, forms)
    elif isinstance(content, str) and content and forms and "text" not in forms:
        plain["content"] = _in_form([content], forms)
    if isinstance(plain.get("tool_calls"), list):
        written = _with_text_arguments if reads["text_arguments"] else _with_parsed_arguments
        plain["tool_calls"] = [written(call) for call in plain["tool_calls"]]
    return plain


def _in_form(texts: Sequence[str], forms: Sequence[str]) -> str | list[dict[str, str]]:
    """Texts as parts where these are read; else joined, as text or as a single part."""
    joined = "\n".join(texts)
    if "parts" not in forms and ("text" in forms or not forms):
        return joined
    return [{"type": "text", "text": text} for text in (texts if "parts" in forms else [joined])]


def _left_out(messages: Sequence[Mapping[str, Any]], index: int, part: int | None = None) -> InvalidRequest:
    """The error for a message, or a part of one, that would never reach the model."""
    param = f"messages.{index}"
    what = f"message {index}, of the role {messages[index].get('role')!r}"
    if part is not None and messages[index].get("tool_calls"):
        param, what = f"{param}.tool_calls.{part}", f"tool call {part} of {what}"
    elif part is not None:
        param, what = f"{param}.content.{part}", f"part {part} of {what}"
    return InvalidRequest(
        f"The chat template leaves out {what}: the model would not see it.",
        hint="Send it under another role or at another place, or use another template (--chat-template FILE).",
        code="message_left_out",
        param=param,
    )


def _text_of_part(part: Any, param: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise InvalidRequest(
        f"A content part of type {kind!r} is not supported.",
        hint='This model reads text only: send {"type": "text", "text": "…"}.',
        param=param,
    )


def _with_parsed_arguments(call: Any) -> Any:
    """OpenAI's API carries the arguments of a call as a JSON string, empty where there are none.

    Templates write them as JSON themselves.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"].strip() or "{}")
    except (ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    return call | {"function": function | {"arguments": arguments}}


def _with_text_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _checked_kwargs(kwargs: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any]:
    for name, value in kwargs.items():
        if not name.isidentifier() or name.startswith("_") or name in _RESERVED_NAMES or name in variables:
            raise InvalidRequest(
                f"chat_template_kwargs may not set '{name}'.",
                hint="Use the names that the template itself defines, e.g. enable_thinking.",
                param=f"chat_template_kwargs.{name}",
            )
        simple = str | bool | int | float | None
        if not isinstance(value, simple) and not (
            isinstance(value, list) and all(isinstance(v, simple) for v in value)
        ):
            raise InvalidRequest(
                f"chat_template_kwargs.{name} must be a string, number, boolean, null or a list of them.",
                param=f"chat_template_kwargs.{name}",
            )
    return dict(kwargs)


def _mark_end(chat: list[dict[str, Any]]) -> None:
    """Append a mark to the text of the last message, where the prompt will be cut."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_MARK
    elif isinstance(content, list) and content:
        content[-1]["text"] += _CONTINUE_MARK
    else:
        raise InvalidRequest("continue_final_message needs a last message with text.", param="continue_final_message")


def _cut_at_mark(text: str) -> str:
    """The text before the mark. A template that trims content has taken the space after the mark: trim as it did."""
    at = text.rfind(_CONTINUE_MARK.strip())
    if at < 0:
        raise InvalidRequest(
            "The chat template leaves out the final message, so it cannot be continued.",
            param="continue_final_message",
        )
    return text[:at] if text[at:].startswith(_CONTINUE_MARK) else text[:at].rstrip()
