"""What a grammar lets the model write is read by the parser as calls that satisfy the tools' schemas."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import jsonschema
import msgspec
import pytest
from byte_tokenizer import GRAMMAR_TOKENS, TOKENIZER, written
from llguidance import LLMatcher
from test_parsers import Found, parsed
from transcripts import TOOLS, TRANSCRIPTS, Transcript

from powerband.core.structured_outputs import MAX_SPECIFICATION_BYTES, StructuredOutputsParams
from powerband.errors import InvalidRequest
from powerband.openai.tools import AllowedTools, NamedTool, Tool
from powerband.output_parsers.answer_grammar import answer_grammar, with_enforced_schemas
from powerband.output_parsers.formats import TOOL_FORMATS, OutputFormat
from powerband.output_parsers.tool_use import ToolUse, tool_use

SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}, "c": {"type": "boolean"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/point"}, "q": {"type": ["number", "null"]}},
        "$defs": {"point": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}},
        "additionalProperties": False,
    },
    {"type": "object", "properties": {"s": {"type": "string", "maxLength": 5}}, "required": ["s"]},
    {"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}], "properties": {"a": {"const": 1}}},
]
NUM_SEEDS = int(os.environ.get("POWERBAND_TEST_SEEDS", "6"))


def use_of(schemas: list[dict[str, Any]], choice: Any = None, parallel: bool | None = None) -> ToolUse:
    tools = [
        {"type": "function", "function": {"name": f"tool_{index}", "parameters": schema}}
        for index, schema in enumerate(schemas)
    ]
    use = tool_use(msgspec.convert(tools, list[Tool]), choice, parallel)
    assert use is not None
    return use


def grammar(format: OutputFormat, use: ToolUse, prompt: str = "", answer: str = "") -> str:
    assert use.rules is not None
    return format.grammar(prompt, with_enforced_schemas(use.rules), TOKENIZER.token_to_id, answer)


def read(format: OutputFormat, use: ToolUse, text: str, prompt: str = "") -> Found:
    parser = format.parser(prompt, use)
    assert parser is not None
    return parsed(parser, [text])


# Formats that write values as text do not enforce what else a schema asks of a string, nor of the whole.
LOOSE = {"qwen3_coder", "pythonic", "gemma3"}


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_required_calls_satisfy_their_schemas(name: str, seed: int) -> None:
    schemas = SCHEMAS[:2] if name in LOOSE else SCHEMAS
    format, use = OutputFormat(name), use_of(schemas, "required")
    text = written(grammar(format, use), seed)
    if text is None:
        return
    found = read(format, use, text, "<|start|>assistant")
    assert found.calls, text
    assert found.content == "" or name == "openai", text  # which may comment first
    for tool, arguments in found.calls:
        jsonschema.validate(json.loads(arguments), schemas[int(tool.removeprefix("tool_"))])


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_most_outputs_are_complete(name: str) -> None:
    use = use_of(SCHEMAS[:2], "required")
    assert sum(written(grammar(OutputFormat(name), use), seed) is not None for seed in range(6)) >= 3


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_text_is_free_and_calls_in_it_are_constrained(name: str) -> None:
    format, use = OutputFormat(name), use_of(SCHEMAS[:2])
    text = grammar(format, use)
    for seed in range(NUM_SEEDS):
        output = written(text, seed, 200)
        for tool, arguments in read(format, use, output, "<|start|>assistant").calls if output else []:
            jsonschema.validate(json.loads(arguments), SCHEMAS[int(tool.removeprefix("tool_"))])


def allows(grammar: str, text: str) -> bool:
    """Whether it may be written, and end there."""
    matcher = LLMatcher(GRAMMAR_TOKENS, grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


# Forms that models write now and then, and parsers read, but no template shows.
UNUSUAL = (
    "a < b",
    "I call <tool_call>",  # tags that are tokens, where text was meant
    "</tool_call>\nDone.",
    "```",
    "[CALL_ID]",
    "[TOOL_CALLS]get_weather{",
    "<|python_start|>",
    "<tool_call>{",
    "<|return|>",
)


@pytest.mark.parametrize(
    "case",
    [case for case in TRANSCRIPTS if case.format and not any(part in case.text for part in UNUSUAL)],
    ids=lambda case: f"{case.format}-{case.text[:30]!r}",
)
def test_transcripts_of_the_format_are_allowed(case: Transcript) -> None:
    if case.format == "gemma3" and case.text.startswith("{"):
        pytest.skip("the grammar has one of its two formats")
    use = tool_use(msgspec.convert(TOOLS, list[Tool]), None, None)
    assert use is not None
    made = grammar(OutputFormat(case.format, case.reasoning_format), use, case.prompt)
    assert allows(made, case.text.removesuffix("<|call|>"))


BROKEN = [
    ("hermes", '<tool_call>\n{"name": "tool_0", "arguments": {"b": "z"}}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>'),
    ("hermes", "<tool_call>\nno call\n</tool_call>"),
    ("qwen3_coder", "<tool_call>\n<function=tool_0>\n<parameter=b>\nz\n</parameter>\n</function>\n</tool_call>"),
    ("qwen3_coder", "<tool_call>\n<function=tool_0>\n</function>\n</tool_call>"),
    ("llama3_json", '{"name": "tool_0", "parameters": {"b": "z"}}'),
    ("pythonic", "[tool_0(b='z')]"),
    ("pythonic", '[tool_0(a="1", b="x")]'),
    ("gemma3", "[tool_0()]"),
    ("mistral", '[TOOL_CALLS] [{"name": "tool_0", "arguments": {}}]'),
    ("mistral_v11", '[TOOL_CALLS]tool_0[ARGS]{"b": 1}'),
    ("openai", "<|channel|>commentary to=functions.tool_0 <|constrain|>json<|message|>{}"),
]


@pytest.mark.parametrize(("name", "text"), BROKEN)
def test_a_call_that_breaks_its_schema_cannot_be_written(name: str, text: str) -> None:
    assert not allows(grammar(OutputFormat(name), use_of(SCHEMAS)), text)


def test_a_tag_that_is_spelled_in_several_tokens_is_constrained_too() -> None:
    made = grammar(OutputFormat("hermes"), use_of(SCHEMAS))
    matcher = LLMatcher(GRAMMAR_TOKENS, made)
    spelled = list(b'<tool_call>\n{"name": "other')
    assert matcher.validate_tokens(spelled) == spelled.index(ord("o"), 22)


def test_a_named_tool_is_the_only_call() -> None:
    use = use_of(SCHEMAS, msgspec.convert({"type": "function", "function": {"name": "tool_2"}}, NamedTool))
    made = grammar(OutputFormat("hermes"), use)
    call = '<tool_call>\n{"name": "tool_2", "arguments": {"s": "a"}}\n</tool_call>'
    assert allows(made, call)
    assert not allows(made, call + "\n" + call)
    assert not allows(made, "Text")
    assert not allows(made, call.replace("tool_2", "tool_3"))


def test_allowed_tools_are_the_only_ones() -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"function": {"name": "tool_2"}}]}}
    use = use_of(SCHEMAS, msgspec.convert(choice, AllowedTools))
    made = grammar(OutputFormat("hermes"), use)
    call = '<tool_call>\n{"name": "tool_2", "arguments": {"s": "a"}}\n</tool_call>'
    assert allows(made, "Text")
    assert allows(made, call)
    assert not allows(made, call.replace("tool_2", "tool_3"))


def test_without_parallel_calls_there_is_one() -> None:
    for name, call, between in (
        ("hermes", '<tool_call>\n{"name": "tool_2", "arguments": {"s": "a"}}\n</tool_call>', "\n"),
        ("mistral_v11", '[TOOL_CALLS]tool_2[ARGS]{"s": "a"}', ""),
        ("llama3_json", '{"name": "tool_2", "parameters": {"s": "a"}}', "; "),
    ):
        for choice in (None, "required"):
            one, many = (grammar(OutputFormat(name), use_of(SCHEMAS, choice, several)) for several in (False, True))
            assert allows(one, call)
            assert allows(many, call + between + call)
            assert not allows(one, call + between + call)


@pytest.mark.parametrize("prompt", ["assistant\n", "assistant\n<think>\n"])
def test_reasoning_is_free_before_calls_and_answers(prompt: str) -> None:
    format, use = OutputFormat("hermes", "qwen3"), use_of(SCHEMAS, "required")
    opening = "" if prompt.endswith("<think>\n") else "<think>\n"
    call = '<tool_call>\n{"name": "tool_2", "arguments": {"s": "a"}}\n</tool_call>'
    thought = f"{opening}I call it: {{ ]\n</think>\n\n"
    made = grammar(format, use, prompt)
    assert allows(made, thought + call)
    assert not allows(made, thought + "No.")
    number = "start: /[0-9]+/"
    alone = format.grammar(prompt, None, TOKENIZER.token_to_id, number)
    assert allows(alone, thought + "42")
    assert not allows(alone, thought + "forty-two")
    both = grammar(format, use_of(SCHEMAS), prompt, number)
    assert allows(both, thought + "42")
    assert allows(both, thought + call)
    assert not allows(both, thought + "no")
    schema = LLMatcher.grammar_from_json_schema('{"type": "object", "required": ["a"]}')
    assert allows(format.grammar(prompt, None, TOKENIZER.token_to_id, schema), thought + '{"a":1}')


def test_no_reasoning_begins_where_the_prompt_has_ended_it() -> None:
    format, call = (
        OutputFormat("hermes", "qwen3"),
        '<tool_call>\n{"name": "tool_2", "arguments": {"s": "x"}}\n</tool_call>',
    )
    made = grammar(format, use_of(SCHEMAS, "required"), "assistant\n<think>\n\n</think>\n\n")
    assert allows(made, call)
    assert not allows(made, f"<think>\nI wonder.\n</think>\n\n{call}")


TREE = {
    "type": "object",
    "$id": "https://example.com/tree",
    "properties": {
        "name": {"type": "string"},
        "parts": {"type": "array", "items": {"$ref": "#"}},
        "size": {"$ref": "#/$defs/size"},
        "other": {"$ref": "#/properties/size"},
    },
    "$defs": {"size": {"type": "integer", "maximum": 9}},
    "required": ["name"],
    "additionalProperties": False,
}
CALLS_WITH_TREES = {
    "qwen3_coder": "<tool_call>\n<function=tool_0>\n<parameter=name>\na\n</parameter>\n"
    "<parameter=parts>\n%s\n</parameter>\n<parameter=size>\n1\n</parameter>\n</function>\n</tool_call>",
    "pythonic": '[tool_0(name="a", parts=%s, size=1)]',
    "hermes": '<tool_call>\n{"name": "tool_0", "arguments": {"name": "a", "parts": %s, "size": 1}}\n</tool_call>',
}


@pytest.mark.parametrize("name", CALLS_WITH_TREES)
def test_references_in_arguments_mean_what_they_mean_in_the_whole_schema(name: str) -> None:
    made, text = grammar(OutputFormat(name), use_of([TREE], "required")), CALLS_WITH_TREES[name]
    assert allows(made, text % '[{"name": "b", "parts": [{"name": "c", "other": 9}]}]')
    assert not allows(made, text % '[[{"name": "b"}]]')
    assert not allows(made, text % '[{"name": "b", "other": 10}]')
    assert not allows(made, text % '[{"parts": []}]')


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
def test_schemas_that_are_too_large_are_left_out_unless_strict(name: str) -> None:
    refers = {"type": "object", "properties": {f"p{i}": {"$ref": "#/$defs/d"} for i in range(2000)}, "$defs": {"d": {}}}
    wide = {"type": "object", "properties": {f"p{i}": {"enum": ["x" * 100]} for i in range(3000)}}
    use = use_of([refers, wide])
    assert use.rules is not None
    compiled: list[str] = []

    def compile_form(form: StructuredOutputsParams, _places: dict[str, str]) -> str:
        compiled.append(form.grammar or "")
        return "grammar"

    assert answer_grammar(OutputFormat(name), "", use.rules, "", TOKENIZER.token_to_id, compile_form) == "grammar"
    assert [len(text) < MAX_SPECIFICATION_BYTES for text in compiled] == [True]
    strict = replace(use.rules, tools=[replace(tool, strict=True) for tool in use.rules.tools])
    with pytest.raises(InvalidRequest, match="together") as caught:
        answer_grammar(OutputFormat(name), "", strict, "", TOKENIZER.token_to_id, compile_form)
    assert (caught.value.param, caught.value.code) == ("tools", "grammar_limit")


def test_a_schema_that_cannot_be_enforced_is_refused_for_strict_tools_only() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "https://example.com/a.json"}}}
    rules = use_of([schema]).rules
    assert rules is not None
    assert with_enforced_schemas(rules).tools[0].schema == {"type": "object"}
    strict = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    use = tool_use([msgspec.convert(strict, Tool)], None, None)
    assert use is not None
    assert use.rules is not None
    with pytest.raises(InvalidRequest) as caught:
        with_enforced_schemas(use.rules)
    assert str(caught.value.param).startswith("tools.0.function.parameters.properties.a")
