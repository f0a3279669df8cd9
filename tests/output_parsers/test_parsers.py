"""Transcripts of every format mean the same however they are cut, and a cut output gives a part of the whole."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transcripts import TOOLS, TRANSCRIPTS, Transcript

from powerband.openai.tools import Tool
from powerband.output_parsers.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from powerband.output_parsers.formats import REASONING_FORMATS, TOOL_FORMATS, OutputFormat
from powerband.output_parsers.output_parser import MAX_CALLS, MAX_EQUAL_CALLS, OutputParser
from powerband.output_parsers.tool_use import tool_use

USE = tool_use(msgspec.convert(TOOLS, list[Tool]), None, None)
TAGS = sorted({tag for name in TOOL_FORMATS for tag in OutputFormat(name).tags} | {"<think>", "</think>", "[THINK]"})


@dataclass
class Found:
    content: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)  # name and arguments
    num_ended: int = 0

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case CallStart(index, name):
                    assert index == len(self.calls)
                    self.calls.append([name, ""])
                case CallArguments(index, text):
                    assert index == len(self.calls) - 1
                    self.calls[index][1] += text
                case CallEnd(index):
                    assert index == self.num_ended
                    self.num_ended += 1

    def is_part_of(self, whole: Found) -> bool:
        pairs = zip(self.calls, whole.calls, strict=False)
        return (
            whole.content.startswith(self.content)
            and whole.reasoning.startswith(self.reasoning)
            and len(self.calls) <= len(whole.calls)
            and all(name == all_name and text.startswith(part) for (name, part), (all_name, text) in pairs)
        )


def parser(case: Transcript) -> OutputParser:
    made = OutputFormat(case.format, case.reasoning_format).parser(case.prompt, USE)
    assert made is not None
    return made


def parsed(made: OutputParser, pieces: Iterable[str], *, complete: bool = True) -> Found:
    found = Found()
    for piece in pieces:
        found.add(made.feed(piece))
    found.add(made.finish(complete=complete))
    return found


def each(case: Transcript) -> Any:
    return pytest.param(case, id=f"{case.format}-{case.text[:30]!r}")


@pytest.mark.parametrize("case", [each(case) for case in TRANSCRIPTS])
def test_a_transcript_means_the_same_at_every_cut(case: Transcript) -> None:
    whole = parsed(parser(case), [case.text])
    assert [(name, json.loads(text)) for name, text in whole.calls] == case.calls
    assert whole.num_ended == len(case.calls)
    assert whole.reasoning == case.reasoning
    assert whole.content == (case.content if case.content or case.calls or case.reasoning else case.text)
    assert parsed(parser(case), case.text) == whole  # character by character
    for place in range(len(case.text) + 1):
        assert parsed(parser(case), [case.text[:place], case.text[place:]]) == whole


@pytest.mark.parametrize("case", [each(case) for case in TRANSCRIPTS])
def test_an_output_that_is_cut_off_gives_a_part_of_the_whole(case: Transcript) -> None:
    """No half of a tag and no half of a call is in the text."""
    whole = parsed(parser(case), [case.text])
    for place in range(len(case.text)):
        cut = parsed(parser(case), [case.text[:place]], complete=False)
        assert cut.is_part_of(whole), case.text[:place]


@pytest.mark.parametrize("case", [each(case) for case in TRANSCRIPTS])
def test_nothing_is_held_back_longer_than_a_tag_may_last(case: Transcript) -> None:
    """Of plain text after a call or at the beginning, no more than what may begin a tag waits."""
    made, found = parser(case), Found()
    found.add(made.feed(case.text))
    before = len(found.content) + len(found.reasoning) + sum(len(text) for _, text in found.calls)
    found.add(made.feed("x" * 2000))
    after = len(found.content) + len(found.reasoning) + sum(len(text) for _, text in found.calls)
    assert after - before >= 900 or case.format in ("qwen3_coder", "pythonic", "gemma3", "openai")


def test_what_stands_between_two_tags_of_mistral_is_no_name() -> None:
    case = Transcript("mistral", '[TOOL_CALLS]Wait.[TOOL_CALLS][{"name": "now", "arguments": {}}]')
    whole = parsed(parser(case), [case.text])
    assert [name for name, _ in whole.calls] == ["now"]
    assert parsed(parser(case), case.text) == whole


TEXTS = st.lists(
    st.one_of(
        st.sampled_from(TAGS),
        st.sampled_from([case.text for case in TRANSCRIPTS]),
        st.sampled_from([*'{}[]()"\\\n ,:=<>|', "<function=", "</function>", "<parameter=a>", "</parameter>"]),
        st.sampled_from(['{"name": "now"', "now(", "get_weather(city=", "'a'", '"arguments": ', "True", "1e5", "name"]),
        st.text(max_size=5),
    ),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
@settings(max_examples=25, deadline=None)
@given(text=TEXTS, data=st.data())
def test_any_text_means_the_same_however_it_is_cut(name: str, text: str, data: st.DataObject) -> None:
    reasoning = data.draw(st.sampled_from(["", *REASONING_FORMATS]))

    def made() -> OutputParser:
        return parser(Transcript(name, "", reasoning_format=reasoning))

    whole = parsed(made(), [text])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(made(), pieces) == whole
    assert parsed(made(), text) == whole
    for start, (_, arguments) in zip(range(len(whole.calls)), whole.calls, strict=True):
        assert start < whole.num_ended
        assert isinstance(arguments, str)
    cut = parsed(made(), [text[: cuts[0]]] if cuts else [], complete=False)
    assert cut.is_part_of(whole)


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS))
@pytest.mark.parametrize(
    "unit", ["<tool_call>", "<", "[", '{"name": "now", ', "[TOOL_CALLS]", "a(", "<|channel|>", "\n"]
)
def test_time_is_in_proportion_to_the_length(name: str, unit: str) -> None:
    """Also for texts that are made of beginnings."""

    def cpu_s(count: int) -> float:
        made = OutputFormat(name).parser("", USE)
        assert made is not None
        start_s = time.process_time()
        text = unit * count
        for place in range(0, len(text), 4):
            made.feed(text[place : place + 4])
        made.finish(complete=True)
        return time.process_time() - start_s

    assert min(cpu_s(8000) for _ in range(2)) < 40 * max(min(cpu_s(500) for _ in range(3)), 2e-3)


@pytest.mark.parametrize(("names", "num_calls"), [(["now"], MAX_EQUAL_CALLS), (["now", "other"], MAX_CALLS)])
def test_an_output_without_end_is_complete_at_some_call(names: list[str], num_calls: int) -> None:
    parser = OutputFormat("hermes").parser("", USE)
    assert parser is not None
    found, count = Found(), 0
    while not parser.is_complete:
        name = names[count % len(names)]
        found.add(parser.feed(f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>'))
        count += 1
    assert (count, len(found.calls)) == (num_calls, num_calls)
