"""Workloads whose answers have a form: the fields that ask for it, and whether an answer has it.

tools         each request must call one of two tools, once
structured    each answer is a JSON object by a schema
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from powerband.bench.client.messages import ServerAddress
from powerband.spec.workload.workload import AnswerForm, RequestMix, Workload


class Order(msgspec.Struct, forbid_unknown_fields=True):
    item: Annotated[str, Meta(max_length=40)]
    colour: Literal["red", "green", "blue", "black"]
    quantity: Annotated[int, Meta(ge=1, le=99)]
    express: bool
    notes: Annotated[list[Annotated[str, Meta(max_length=40)]], Meta(max_length=3)]


class Weather(msgspec.Struct, forbid_unknown_fields=True):
    """The weather in a city."""

    city: Annotated[str, Meta(max_length=40)]
    unit: Literal["celsius", "fahrenheit"]


class Appointment(msgspec.Struct, forbid_unknown_fields=True):
    """Write an appointment into the calendar."""

    title: Annotated[str, Meta(max_length=60)]
    day: Annotated[int, Meta(ge=1, le=31)]
    hour: Annotated[int, Meta(ge=0, le=23)]


MAX_FORM_TOKENS = 384  # of an answer: every one that has the form has fewer
_TOOLS: dict[str, type[msgspec.Struct]] = {"get_weather": Weather, "add_appointment": Appointment}


def _schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    (found,), definitions = msgspec.json.schema_components([kind])
    schema: dict[str, Any] = definitions[found["$ref"].rpartition("/")[2]]
    return {name: schema[name] for name in ("type", "properties", "required", "additionalProperties")}


def _tool(name: str, kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": kind.__doc__, "parameters": _schema(kind)}}


FIELDS: dict[AnswerForm, dict[str, Any]] = {
    "text": {},
    "tools": {
        "tools": [_tool(name, kind) for name, kind in _TOOLS.items()],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    },
    "structured": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "order", "strict": True, "schema": _schema(Order)},
        }
    },
}


def form_of(workload: Workload) -> AnswerForm:
    return workload.requests.form if isinstance(workload.requests, RequestMix) else "text"


def asking_for(form: AnswerForm, target: ServerAddress) -> ServerAddress:
    """The target, whose requests ask for answers of this form. Those are chats, and end by themselves."""
    if form == "text":
        return target
    return msgspec.structs.replace(target, endpoint="chat", form=form, ignore_eos=False)


def is_valid(form: AnswerForm, text: str, calls: Sequence[Sequence[str]]) -> bool | None:
    """Whether an answer has the form. None: it has none to have. calls: names and arguments."""
    if form == "text":
        return None
    if form == "structured":
        return _is(Order, text)
    return bool(calls) and all(name in _TOOLS and _is(_TOOLS[name], arguments) for name, arguments in calls)


def _is(kind: type[msgspec.Struct], text: str) -> bool:
    try:
        msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeError):
        return False
    return True
