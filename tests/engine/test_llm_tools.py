"""`LLM.chat` with tools: with random weights and a high temperature, every call satisfies its tool's schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from powerband import LLM, SamplingParams
from powerband.errors import InvalidRequest
from text.templates import LLAMA3, QWEN3

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["c", "f"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
USER = [{"role": "user", "content": "What is the weather in Berlin?"}]
HOT = SamplingParams(temperature=2.0, max_tokens=200, seed=1, n=6)


@pytest.fixture(scope="module", params=[QWEN3, LLAMA3], ids=["hermes", "llama3_json"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(request.param)
    settings: dict[str, Any] = {"load_format": "dummy", "dtype": "float32", "device": "cpu", "threads": 1}
    parser = "auto" if request.param == QWEN3 else "llama3_json"
    with LLM(
        "demo",
        chat_template=str(template),
        tool_call_parser=parser,
        reasoning_parser="none",
        kv_cache_memory="32MiB",
        max_model_len=1024,
        **settings,
    ) as llm:
        yield llm


def test_required_calls_satisfy_their_schemas(llm: LLM) -> None:
    one: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    [result] = llm.chat(USER, HOT, tools=TOOLS, **one, use_tqdm=False)
    ended = [output for output in result.outputs if output.finish_reason == "tool_calls"]
    assert len(ended) >= 2
    for output in ended:
        assert output.content is None
        for call in output.tool_calls or pytest.fail("there is no call"):
            arguments = json.loads(call.function.arguments)
            jsonschema.validate(arguments, SCHEMA if call.function.name == "get_weather" else {"maxProperties": 0})


def test_a_named_tool_is_called_once(llm: LLM) -> None:
    choice = {"type": "function", "function": {"name": "now"}}
    [result] = llm.chat(USER, HOT, tools=TOOLS, tool_choice=choice, use_tqdm=False)
    for output in result.outputs:
        if output.finish_reason == "tool_calls":
            [call] = output.tool_calls or []
            assert (call.function.name, call.function.arguments) == ("now", "{}")
            assert call.id.startswith("call_")


def test_without_tools_text_is_content(llm: LLM) -> None:
    [result] = llm.chat(USER, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    assert result.outputs[0].tool_calls is None
    [plain] = llm.generate("a", SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    assert plain.outputs[0].content is None


def test_wrong_tools_are_refused_by_name(llm: LLM) -> None:
    unknown = {"type": "function", "function": {"name": "no"}}
    for wrong, param in (
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools.2.function.name"),
        ({"tools": TOOLS, "tool_choice": unknown}, "tool_choice.function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            llm.chat(USER, HOT, **wrong, use_tqdm=False)  # type: ignore[arg-type]  # wrong on purpose
        assert caught.value.param == param
    with pytest.raises(InvalidRequest, match="no call before it"):
        llm.chat([*USER, {"role": "tool", "tool_call_id": "x", "content": "1"}], HOT, use_tqdm=False)
