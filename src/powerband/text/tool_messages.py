"""Tool calls and results in a conversation: what must be right about them, and how they become plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from powerband.errors import InvalidRequest

# The words, and the format of calls, are those of Google's guide to function calling with Gemma 3.
_INTRODUCTION = """\
You have access to functions. If you decide to invoke any of the function(s),
you MUST put it in the format of
[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]

You SHOULD NOT include any other text in the response if you call a function
"""


def check_tool_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Every result must answer a call of the assistant's message before it, and arguments must be a JSON object.

    A result without `tool_call_id` answers the first call that has none yet. Raises InvalidRequest naming the place.
    """
    unanswered: dict[str, None] = {}  # ids of calls of the last assistant's message
    for index, message in enumerate(messages):
        role, place = message.get("role"), f"messages.{index}"
        if role == "assistant":
            unanswered = dict.fromkeys(_call_ids(message.get("tool_calls"), place))
        elif role == "tool":
            _answer(message, unanswered, place)
        else:
            unanswered = {}


def _answer(message: Mapping[str, Any], unanswered: dict[str, None], place: str) -> None:
    id = message.get("tool_call_id")
    if id is None and unanswered:
        del unanswered[next(iter(unanswered))]
    elif id in unanswered:
        del unanswered[id]
    else:
        param = place if id is None else f"{place}.tool_call_id"
        what = "has no 'tool_call_id'" if id is None else f"answers {str(id)[:80]!r}"
        raise InvalidRequest(
            f"'{place}' is the result of a tool and {what}; no call before it waits for one.",
            hint="Send results right after the assistant's message with their 'tool_calls', one for each call.",
            param=param,
        )


def _call_ids(calls: Any, place: str) -> list[str]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        return []
    ids: list[str] = []
    for index, call in enumerate(calls):
        if not isinstance(call, Mapping):
            continue
        id = str(call.get("id", f"#{index}"))
        if id in ids:
            param = f"{place}.tool_calls.{index}.id"
            raise InvalidRequest(f"'{param}' is {id[:80]!r}, as is that of another call before it.", param=param)
        ids.append(id)
        function = call.get("function")
        if isinstance(function, Mapping) and "arguments" in function:
            _check_arguments(function["arguments"], f"{place}.tool_calls.{index}.function.arguments")
    return ids


def _check_arguments(arguments: Any, param: str) -> None:
    """Empty text stands for no arguments."""
    value = arguments
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments.strip() or "{}")
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, Mapping):
        shown = repr(arguments)
        raise InvalidRequest(
            f"'{param}' is {shown if len(shown) <= 80 else shown[:77] + '…'}; it must be the text of a JSON object.",
            hint="Send the arguments as the model wrote them, or leave out a call that is not valid.",
            param=param,
        )


def tools_as_text(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """The conversation for a model whose chat template has no tools.

    They stand in the first message, calls are text, and results are the user's.

    Messages must have passed `check_tool_messages`.
    """
    written: list[dict[str, Any]] = []
    for message in messages:
        if message.get("role") == "tool":
            result = f"```tool_output\n{_text(message)}\n```"
            if written and written[-1].get("is_result"):  # results of parallel calls are one message
                written[-1]["content"] += f"\n{result}"
            else:
                written.append({"role": "user", "content": result, "is_result": True})
        elif message.get("tool_calls"):
            calls = ", ".join(map(_call, message["tool_calls"]))
            text = f"{_text(message)}\n[{calls}]".lstrip("\n")
            kept = {key: value for key, value in message.items() if key not in ("tool_calls", "content")}
            written.append({**kept, "content": text})
        else:
            written.append(dict(message))
    for message in written:
        message.pop("is_result", None)
    if tools:
        introduction = _INTRODUCTION + json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
        if written[0].get("role") in ("system", "developer"):
            written[0]["content"] = f"{_text(written[0])}\n\n{introduction}"
        else:
            written.insert(0, {"role": "system", "content": introduction})
    return written


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(str(part.get("text", "")) for part in content)


def _call(call: Mapping[str, Any]) -> str:
    function = call["function"]
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments.strip() or "{}")
    return f"{function['name']}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
