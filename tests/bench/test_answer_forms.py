"""Workloads whose answers have a form: what is asked for, and which answers count as valid."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema
import pytest

from powerband.bench.client.answer_forms import FIELDS, is_valid
from powerband.bench.client.responses import ParsedResponse, parse_response
from powerband.http_client.connection import CollectedResponse
from powerband.metrics.figures import Window, summarize
from powerband.metrics.record import RequestRecord
from powerband.spec.slo import SLO
from powerband.spec.workload.presets import preset
from powerband.spec.workload.workload import mix_as_dict, mix_from_dict

ORDER: dict[str, Any] = {"item": "hat", "colour": "red", "quantity": 3, "express": False, "notes": []}
WEATHER: dict[str, Any] = {"city": "Oslo", "unit": "celsius"}
SCHEMA = FIELDS["structured"]["response_format"]["json_schema"]["schema"]
TOOLS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in FIELDS["tools"]["tools"]}
CHANGES: list[dict[str, Any]] = [
    {},
    {"quantity": 0},
    {"quantity": "3"},
    {"quantity": 2.5},
    {"colour": "pink"},
    {"notes": ["a", "b", "c", "d"]},
    {"notes": ["x" * 41]},
    {"item": None},
    {"more": 1},
    {"express": 0},
]


@pytest.mark.parametrize("change", CHANGES)
def test_an_object_is_valid_if_jsonschema_finds_it_valid(change: dict[str, Any]) -> None:
    value = ORDER | change
    expected = jsonschema.Draft202012Validator(SCHEMA).is_valid(value)
    assert is_valid("structured", json.dumps(value), []) is expected is (not change)


@pytest.mark.parametrize("text", ["", "{", '{"item": "hat"}', json.dumps(ORDER) + "x", "null"])
def test_half_an_object_is_not_valid(text: str) -> None:
    assert is_valid("structured", text, []) is False
    assert is_valid("text", text, []) is None


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([("get_weather", json.dumps(WEATHER))], True),
        ([("get_weather", json.dumps(WEATHER)), ("add_appointment", '{"title": "a", "day": 31, "hour": 0}')], True),
        ([], False),
        ([("get_time", "{}")], False),
        ([("get_weather", '{"city": "Oslo"}')], False),
        ([("get_weather", json.dumps(WEATHER)), ("add_appointment", '{"title": "a", "day": 32, "hour": 0}')], False),
    ],
)
def test_calls_are_valid_if_each_is_of_a_tool_with_its_arguments(calls: list[tuple[str, str]], expected: bool) -> None:
    assert is_valid("tools", "", calls) is expected
    if calls and all(name in TOOLS for name, _ in calls):
        assert expected is all(
            jsonschema.Draft202012Validator(TOOLS[name]).is_valid(json.loads(text)) for name, text in calls
        )


def test_calls_that_come_in_pieces_are_put_together() -> None:
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"content": "I look."},
        {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "get_weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ': "Oslo"}'}}]},
        {"tool_calls": [{"index": 1, "id": "b", "function": {"name": "now", "arguments": "{}"}}]},
    ]
    chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})

    async def read() -> ParsedResponse:
        answer = CollectedResponse(1 << 20)
        answer.status = 200
        answer.pieces += [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks]
        answer.times_s += [0.0] * len(chunks)
        return parse_response(answer)

    reading = asyncio.run(read())
    assert reading.problem == ""
    assert reading.content == "I look."
    assert list(reading.calls.values()) == [["get_weather", '{"city": "Oslo"}'], ["now", "{}"]]


def test_an_invalid_answer_is_not_in_goodput() -> None:
    records = [
        RequestRecord(
            scheduled_s=0.1, sent_s=0.1, chunk_times_s=(0.2,), chunk_tokens=(1,), output_tokens=1, is_valid=one
        )
        for one in (True, True, False, True)
    ]
    summary = summarize(records, Window(0.0, 1.0), SLO(ttft_s=1.0))
    assert (summary.good, summary.goodput, summary.valid_share, summary.misses) == (3, 3.0, 0.75, {"invalid": 1})


@pytest.mark.parametrize("name", ["tools", "structured"])
def test_the_form_is_kept_in_files(name: str) -> None:
    mix = preset(name).mix
    assert mix.form == name
    assert mix_from_dict(mix_as_dict(mix)) == mix
    assert "form" not in mix_as_dict(preset("chat").mix)
