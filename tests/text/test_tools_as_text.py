"""Tools for a template that has none; and what a template is found to read of tools and calls."""

from __future__ import annotations

import pytest

from powerband.text.chat_template import ChatTemplate
from text.templates import CHATML, GEMMA, LLAMA3, QWEN3

TOOL = {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object"}}}
CALLS = [
    {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC", "exact": true}'}},
    {"id": "2", "type": "function", "function": {"name": "now", "arguments": ""}},
]
TALK = [
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "1", "content": "noon"},
    {"role": "tool", "tool_call_id": "2", "content": "12:00"},
]
# As DeepSeek's: arguments are a text that is put between others.
TEXT_ARGUMENTS = """\
{%- for m in messages %}{{ m.role }}: {{ m.content or '' }}
{%- for c in m.tool_calls or [] %}{{ c.function.name + '\\n```json\\n' + c.function.arguments + '\\n```' }}{% endfor %}
{% endfor %}"""


@pytest.mark.parametrize(("source", "writes"), [(CHATML, False), (GEMMA, False), (QWEN3, True), (LLAMA3, True)])
def test_whether_a_template_writes_tools(source: str, writes: bool) -> None:
    template = ChatTemplate({"default": source})
    assert template.writes_tools == writes
    template.close()


def test_arguments_are_text_for_a_template_that_reads_text() -> None:
    template = ChatTemplate({"default": TEXT_ARGUMENTS})
    call = {"function": {"name": "now", "arguments": '{"zone": "Zürich"}'}}
    text = template.render([TALK[0], {"role": "assistant", "tool_calls": [call]}])
    template.close()
    assert 'now\n```json\n{"zone": "Zürich"}\n```' in text


def test_tools_calls_and_results_are_text_of_messages() -> None:
    template = ChatTemplate({"default": CHATML})
    text = template.render([{"role": "system", "content": "Be brief."}, *TALK], tools=[TOOL], tools_in_text=True)
    plain = template.render(TALK[:1], tools_in_text=True)
    template.close()
    assert "Be brief.\n\nYou have access to functions." in text
    assert '[{"name": "now", "description": "The time", "parameters": {"type": "object"}}]' in text
    assert "[now(zone='UTC', exact=True), now()]" in text
    assert "```tool_output\nnoon\n```\n```tool_output\n12:00\n```" in text
    assert "functions" not in plain


def test_a_switch_is_a_variable_and_not_a_field() -> None:
    template = ChatTemplate({"default": "{{ m.thinking }}{{ m['effort'] }}{% if enable_thinking %}a{% endif %}"})
    assert template.has_variable("enable_thinking")
    assert not template.has_variable("thinking")
    assert not template.has_variable("effort")
    template.close()
