"""Outputs of models in each format, made from its documentation, and what they mean."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"}},
    "required": ["city"],
    "additionalProperties": False,
}
SEARCH = {
    "type": "object",
    "properties": {
        "query": {"type": "string"},
        "filters": {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}}}},
        "limit": {"type": ["integer", "null"]},
    },
    "required": ["query"],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "search", "description": "Search", "parameters": SEARCH}},
    {"type": "function", "function": {"name": "now", "description": "The time"}},
]


@dataclass(frozen=True)
class Transcript:
    format: str
    text: str
    calls: list[tuple[str, Any]] = field(default_factory=list)
    content: str = ""
    reasoning: str = ""
    reasoning_format: str = ""
    prompt: str = ""


BERLIN = ("get_weather", {"city": 'Berlin "Mitte"', "days": 3})
NESTED = ("search", {"query": "a < b </tool_call> [/INST] ü\n", "filters": {"tags": ["x", "{"]}, "limit": None})
NOW = ("now", {})


def _object(call: tuple[str, Any], key: str = "arguments") -> str:
    return json.dumps({"name": call[0], key: call[1]}, ensure_ascii=False)


def _hermes(*calls: tuple[str, Any]) -> str:
    return "\n".join(f"<tool_call>\n{_object(call)}\n</tool_call>" for call in calls)


def _xml(call: tuple[str, Any]) -> str:
    values = {key: v if isinstance(v, str) else json.dumps(v) for key, v in call[1].items()}
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={call[0]}>\n{parameters}</function>\n</tool_call>"


def _python(*calls: tuple[str, Any]) -> str:
    written = []
    for name, arguments in calls:
        keywords = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        written.append(f"{name}({keywords})")
    return f"[{', '.join(written)}]"


_ANALYSIS = "<|channel|>analysis<|message|>The user wants\nthe weather.<|end|><|start|>assistant"
_BERLIN_JSON = json.dumps(BERLIN[1])
TRANSCRIPTS = [
    Transcript("hermes", "Just text, 1 < 2."),
    Transcript("hermes", _hermes(BERLIN), [BERLIN]),
    Transcript("hermes", "I look.\n" + _hermes(BERLIN, NESTED, NOW), [BERLIN, NESTED, NOW], "I look.\n"),
    Transcript("hermes", f"<tool_call>{_object(NESTED)}</tool_call>\nDone.", [NESTED], "Done."),
    Transcript(
        "hermes",
        "<think>\nI call <tool_call> soon.\n\n</think>\n\n" + _hermes(BERLIN),
        [BERLIN],
        "",
        "I call <tool_call> soon.\n",
        "qwen3",
        "<|im_start|>assistant\n",
    ),
    Transcript("hermes", "ok\n</think>\n\nYes.", [], "Yes.", "ok", "qwen3", "<|im_start|>assistant\n<think>\n"),
    Transcript("hermes", "Yes.", [], "Yes.", "", "qwen3", "assistant\n<think>\n\n</think>\n\n"),
    Transcript("", "<think>a</think>b</think>", [], "b</think>", "a", "deepseek_r1", "<|Assistant|>"),
    Transcript("", "a\n</think>\nb", [], "b", "a", "deepseek_r1", "<|Assistant|>"),
    Transcript("mistral_v11", "[THINK]a[/THINK]b", [], "b", "a", "mistral", "[/INST]"),
    Transcript("qwen3_coder", _xml(BERLIN), [BERLIN]),
    Transcript("qwen3_coder", "First.\n\n" + _xml(NESTED) + "\n" + _xml(NOW), [NESTED, NOW], "First.\n\n"),
    Transcript("qwen3_coder", "if a <b: <tool", [], "if a <b: <tool"),
    Transcript("llama3_json", _object(BERLIN, "parameters"), [BERLIN]),
    Transcript("llama3_json", "<|python_tag|>" + _object(NESTED, "parameters"), [NESTED]),
    Transcript("llama3_json", f"{_object(BERLIN, 'parameters')}; {_object(NESTED, 'parameters')}", [BERLIN, NESTED]),
    Transcript("llama3_json", '{"type": "function", "name": "now", "parameters": {}}', [NOW]),
    Transcript("llama3_json", '{"name": "Ada", "age": 36}', [], '{"name": "Ada", "age": 36}'),
    Transcript("llama3_json", '{"answer": {"name": "now"}}', [], '{"answer": {"name": "now"}}'),
    Transcript("pythonic", _python(BERLIN), [BERLIN]),
    Transcript("pythonic", _python(NESTED, NOW, BERLIN), [NESTED, NOW, BERLIN]),
    Transcript("pythonic", f"<|python_start|>{_python(BERLIN)}<|python_end|>", [BERLIN]),
    Transcript("pythonic", "[1, 2, 3]", [], "[1, 2, 3]"),
    Transcript("pythonic", "[exit(code=1)]", [], "[exit(code=1)]"),
    Transcript("gemma3", _python(BERLIN), [BERLIN]),
    Transcript("gemma3", f"```tool_code\n{_python(BERLIN)[1:-1]}\n```", [BERLIN]),
    Transcript("gemma3", _object(BERLIN, "parameters"), [BERLIN]),
    Transcript("gemma3", f"```json\n{_object(BERLIN, 'parameters')}\n```", [BERLIN]),
    Transcript("gemma3", "```json\n[1]\n```", [], "```json\n[1]\n```"),
    Transcript("mistral", f"[TOOL_CALLS] [{_object(BERLIN)}, {_object(NOW)}]", [BERLIN, NOW]),
    Transcript("mistral", f"Wait.[TOOL_CALLS][{_object(NESTED)}]", [NESTED], "Wait."),
    Transcript("mistral_v11", f"[TOOL_CALLS]get_weather[ARGS]{_BERLIN_JSON}[TOOL_CALLS]now[ARGS]{{}}", [BERLIN, NOW]),
    Transcript("mistral_v11", f"[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{_BERLIN_JSON}", [BERLIN]),
    Transcript("mistral_v11", f"[TOOL_CALLS]get_weather{_BERLIN_JSON}", [BERLIN]),
    Transcript("openai", "<|channel|>final<|message|>Hello.<|return|>", [], "Hello."),
    Transcript(
        "openai",
        f"{_ANALYSIS}<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{_BERLIN_JSON}<|call|>",
        [BERLIN],
        "",
        "The user wants\nthe weather.",
        "openai_gptoss",
        "<|start|>assistant",
    ),
    Transcript(
        "openai",
        f"{_ANALYSIS}<|channel|>commentary<|message|>I look.<|end|>"
        f"<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{_BERLIN_JSON}",
        [BERLIN],
        "I look.",
        "The user wants\nthe weather.",
        "openai_gptoss",
        "<|start|>assistant",
    ),
]
