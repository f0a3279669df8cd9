"""Formats are known by their templates; tags that are special tokens are read; outputs resume at any token."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import msgspec
import pytest
from byte_tokenizer import END, TOKENIZER
from test_parsers import Found
from transcripts import TOOLS, TRANSCRIPTS, Transcript

from powerband.core.params import SamplingParams
from powerband.core.step import FinishReason, TokenOutput
from powerband.engine.client.output_reader import OutputReader
from powerband.errors import InvalidRequest
from powerband.openai.tools import Tool
from powerband.output_parsers.formats import REASONING_FORMATS, TOOL_FORMATS, OutputFormat
from powerband.output_parsers.tool_use import tool_use
from powerband.spec.settings import EngineSettings
from powerband.text.tokenizer import Tokenizer
from text.templates import ALL, QWEN3

USE = tool_use(msgspec.convert(TOOLS, list[Tool]), None, None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    made = Tokenizer.load(folder)
    assert made is not None
    return made


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def outputs(ids: list[int]) -> list[TokenOutput]:
    made = [TokenOutput("r", [id], 0.0) for id in ids]
    made[-1].finish_reason = FinishReason.STOP
    return made


@pytest.mark.parametrize("case", TRANSCRIPTS, ids=lambda case: f"{case.format}-{case.text[:30]!r}")
def test_outputs_mean_the_same_where_tags_are_special_tokens_and_after_a_resume(
    tokenizer: Tokenizer, case: Transcript
) -> None:
    if "</tool_call> [/INST]" in case.text and "qwen" in case.format:
        pytest.skip("the tag is a token, where text was meant")
    format = OutputFormat(case.format, case.reasoning_format)
    ids = token_ids(tokenizer, case.text)
    reader = OutputReader(format, case.prompt, USE)

    def read(cut: int) -> tuple[Found, Found]:
        """What was found in all tokens before `cut`, and in those after it by a processor that resumed there."""
        first, second = (reader.processor(tokenizer, SamplingParams(), []) for _ in range(2))
        before, after = Found(), Found()
        for output in outputs(ids)[:cut]:
            before.add(first.process(output).events)
        second.resume(ids[:cut])
        after.calls = [list(call) for call in before.calls]
        after.num_ended = before.num_ended
        for output in outputs(ids)[cut:]:
            after.add(second.process(output).events)
        return before, after

    whole, _ = read(len(ids))
    assert [(name, json.loads(arguments)) for name, arguments in whole.calls] == case.calls
    assert whole.content == (case.content if case.content or case.calls or case.reasoning else case.text)
    assert whole.reasoning == case.reasoning
    for cut in range(1, len(ids)):
        before, after = read(cut)
        assert before.content + after.content == whole.content
        assert before.reasoning + after.reasoning == whole.reasoning
        assert after.calls == whole.calls


def test_special_tokens_that_are_no_tags_are_left_out(tokenizer: Tokenizer) -> None:
    reader = OutputReader(OutputFormat("hermes"), "", USE)
    processor = reader.processor(tokenizer, SamplingParams(), [])
    found = Found()
    for output in outputs(token_ids(tokenizer, f"a{END}[THINK]b<|start|>c")):
        found.add(processor.process(output).events)
    assert found.content == "abc"


def test_a_format_is_known_by_the_template() -> None:
    assert OutputFormat.of(QWEN3) == OutputFormat("hermes", "qwen3")
    assert OutputFormat.of(ALL["chatml"]) == OutputFormat()
    assert OutputFormat.of(ALL["gemma"]) == OutputFormat("gemma3")
    for part, expected in (
        ("<|start|>assistant<|channel|>analysis<|message|>", OutputFormat("openai", "openai_gptoss")),
        ("[TOOL_CALLS] [", OutputFormat("mistral")),
        ("[THINK][/THINK][TOOL_CALLS]name[ARGS]{}", OutputFormat("mistral_v11", "mistral")),
        ("<tool_call>\n<function=a>\n<parameter=b>", OutputFormat("qwen3_coder")),
        ("<|python_tag|> <|eot_id|>", OutputFormat("llama3_json")),
        ("<|python_start|>[func_name1(a=b)]<|python_end|>", OutputFormat("pythonic")),
        ("<tool_call>{name}\n<arg_key>", OutputFormat()),
    ):
        assert OutputFormat.of(part) == expected, part
    assert OutputFormat.of(QWEN3, "mistral", "none") == OutputFormat("mistral")
    assert OutputFormat.of("", "hermes", "deepseek_r1") == OutputFormat("hermes", "deepseek_r1")


def test_the_settings_name_every_format() -> None:
    hints = typing.get_type_hints(EngineSettings)
    assert set(typing.get_args(hints["tool_call_parser"])) == {"auto", "none", *TOOL_FORMATS}
    assert set(typing.get_args(hints["reasoning_parser"])) == {"auto", "none", *REASONING_FORMATS}


def test_reasoning_is_open_where_the_prompt_opens_it() -> None:
    for name, prompt, is_open in (
        ("qwen3", "<|im_start|>assistant\n", False),
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("qwen3", "user: what is <think>?\nassistant\n", False),
        ("deepseek_r1", "<|Assistant|>", True),
        ("deepseek_r1", "<|Assistant|><think>\n\n</think>\n\n", False),
    ):
        assert OutputFormat("", name).starts_in_reasoning(prompt) == is_open
    assert OutputFormat("", "qwen3").continued("<think>\nI think that") == "<think>"
    assert OutputFormat("", "qwen3").continued("<think>a</think>The answer") == "</think>"


def test_tokens_of_the_reasoning_are_counted_without_its_tags(tokenizer: Tokenizer) -> None:
    for text, count in (("<think>abc</think>def", 3), ("<think>abc\n</think>def", 3), ("abc", 0), ("<think>a<b", 3)):
        processor = OutputReader(OutputFormat("", "qwen3")).processor(tokenizer, SamplingParams(), [])
        for output in outputs(token_ids(tokenizer, text)):
            processor.process(output)
        assert processor.parser is not None
        assert processor.parser.num_reasoning_tokens == count, text


def test_the_bundled_models_template_is_not_taken_for_one_with_tools() -> None:
    demo = Path(__file__).parents[2] / "src" / "powerband" / "demo" / "tokenizer_config.json"
    assert OutputFormat.of(json.loads(demo.read_text())["chat_template"]).reasoning == ""


def test_names_of_tools_that_are_refused() -> None:
    for name in ("", "two words", 'a"b', "a" * 129, "ü"):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"function": {"name": name}}, Tool)
    for name in ("get_weather", "mcp/server.tool", "a-b:c"):
        assert msgspec.convert({"function": {"name": name}}, Tool).function.name == name
    twice = [Tool(function=USE.tools[0]), Tool(function=USE.tools[0])] if USE is not None else []
    with pytest.raises(InvalidRequest) as caught:
        tool_use(twice, None, None)
    assert caught.value.param == "tools.1.function.name"
