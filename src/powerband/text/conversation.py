"""What must be right about tool calls and their results in a conversation, before a template writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from powerband.errors import InvalidRequest


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
