"""The form of content that a template reads, the roles that it knows, and that it leaves no message out in silence."""

import pytest
import templates

from powerband.errors import InvalidRequest
from powerband.text.chat_template import ChatTemplate

# Templates that read content in one way only, or in several; each writes "role: text".
OVER_PARTS = """{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'text' %}
{{- c['text'] }}{% endif %}{% endfor %}|{% endfor %}"""
ALIASED = """{% for m in messages %}{{ m.role }}: {% set body = m.content %}{% set parts = body %}
{%- for c in parts %}{{ c.text }}{% endfor %}|{% endfor %}"""
MACRO = """{% macro show(body) %}{% for c in body %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}
{%- endmacro %}{% for m in messages %}{{ m.role }}: {{ show(m.content) }}|{% endfor %}"""
MACRO_FOR_BOTH = """{% macro show(body) %}{% if body is string %}{{ body }}{% else %}{% for c in body %}{{ c.text }}
{%- endfor %}{% endif %}{% endmacro %}{% for m in messages %}{{ m.role }}: {{ show(m.content) }}|{% endfor %}"""
FILTERED = "{% for m in messages %}{{ m.role }}: {{ m.content|map(attribute='text')|join }}|{% endfor %}"
FIRST_PART = "{% for m in messages %}{{ m['role'] + ': ' + m['content'][0]['text'] }}|{% endfor %}"
TEXT = "{% for m in messages %}{{ m.role + ': ' + m.content }}|{% endfor %}"
TEXT_PRINTED = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
TEXT_AS_JSON = "{% for m in messages %}{{ m.role }}: {{ m.content|tojson }}|{% endfor %}"
LOUD = "{% for m in messages %}{{ m.role }}: {{ m.content|upper }}|{% endfor %}"
# Gemma 3's way: all parts of a user, the first one of a system.
MIXED = """{% for m in messages %}{{ m.role }}: {% if m.role == 'system' %}{{ m.content[0].text }}
{%- elif m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}|
{%- endfor %}"""
JOINING = {"text": TEXT, "printed": TEXT_PRINTED, "first part": FIRST_PART}
READING_PARTS = {
    "over parts": OVER_PARTS,
    "aliased": ALIASED,
    "macro": MACRO,
    "macro for both": MACRO_FOR_BOTH,
    "filtered": FILTERED,
}

SAFE = {"role": "user", "content": "is this safe"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "is this"}, {"type": "text", "text": " safe"}]}


@pytest.fixture(scope="module")
def made():
    cache = {}

    def make(source):
        if source not in cache:
            cache[source] = ChatTemplate({"default": source})
        return cache[source]

    yield make
    for template in cache.values():
        template.close()


def transformers_render(source, messages, **options):
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **options)[0][0]


@pytest.mark.parametrize("name", [*JOINING, *READING_PARTS])
def test_text_reaches_every_template(made, name):
    source = (JOINING | READING_PARTS)[name]
    assert made(source).render([SAFE]) == "user: is this safe|"


@pytest.mark.parametrize("name", [*JOINING, *READING_PARTS])
def test_every_part_reaches_every_template(made, name):
    text = made((JOINING | READING_PARTS)[name]).render([PARTS])
    assert text == ("user: is this\n safe|" if name in JOINING else "user: is this safe|")


@pytest.mark.parametrize("name", READING_PARTS)
def test_parts_are_written_as_by_transformers(made, name):
    assert made(READING_PARTS[name]).render([PARTS]) == transformers_render(READING_PARTS[name], [PARTS])


def test_each_role_is_given_content_in_the_form_that_is_read_of_it(made):
    system = {"role": "system", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]}
    assert made(MIXED).render([system, PARTS]) == "system: be\nbrief|user: is this safe|"
    assert made(MIXED).render([{"role": "system", "content": "short"}, SAFE]) == "system: short|user: is this safe|"


@pytest.mark.parametrize("source", [TEXT_AS_JSON, LOUD])
def test_text_may_be_changed_on_its_way(made, source):
    assert "is this safe" in made(source).render([SAFE]).lower()
    assert "type" not in made(source).render([PARTS])


# Branches per role, as many templates have; what has no branch is not written.
BRANCHES = """{% if messages[0].role == 'system' %}system: {{ messages[0].content }}|{% endif %}
{%- for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.role }}: {{ m.content }}|{% endif %}{% endfor %}"""
KNOWING_DEVELOPER = """{% for m in messages %}{% if m.role == 'developer' %}instructions: {{ m.content }}|
{%- else %}{{ m.role }}: {{ m.content }}|{% endif %}{% endfor %}"""
NO_SYSTEM = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.content }}|{% endif %}{% endfor %}"
USER = {"role": "user", "content": "hello there"}
ASSISTANT = {"role": "assistant", "content": "let me look"}
DEVELOPER = {"role": "developer", "content": "Answer in rhymes."}


@pytest.mark.parametrize("source", [BRANCHES, TEXT, *templates.ALL.values()])
def test_a_developer_is_a_system_where_the_template_does_not_know_the_role(made, source):
    if source == templates.GEMMA:
        return  # it has no system either
    as_system = [{**DEVELOPER, "role": "system"}, USER]
    assert made(source).render([DEVELOPER, USER]) == made(source).render(as_system)


def test_a_developer_stays_one_where_the_template_knows_the_role(made):
    assert made(KNOWING_DEVELOPER).render([DEVELOPER, USER]) == "instructions: Answer in rhymes.|user: hello there|"


@pytest.mark.parametrize(
    ("source", "messages", "index", "role"),
    [
        (NO_SYSTEM, [DEVELOPER, USER], 0, "developer"),
        (NO_SYSTEM, [{"role": "system", "content": "Be brief."}, USER], 0, "system"),
        (BRANCHES, [USER, {"role": "system", "content": "Be brief."}], 1, "system"),
        (BRANCHES, [USER, ASSISTANT, {"role": "tool", "content": "21 degrees"}], 2, "tool"),
        (BRANCHES, [USER, ASSISTANT, {"role": "ipython", "content": "21 degrees"}, USER], 2, "ipython"),
        (BRANCHES, [USER, ASSISTANT, {"role": "function", "name": "f", "content": "21"}, USER], 2, "function"),
        (BRANCHES, [USER, {"role": "tool", "content": "hello there"}], 1, "tool"),  # the text is there, from another
        (BRANCHES, [USER, {"role": "tool", "content": [{"type": "text", "text": "21"}]}], 1, "tool"),
    ],
)
def test_a_message_that_would_not_reach_the_model_is_an_error_that_names_it(made, source, messages, index, role):
    with pytest.raises(InvalidRequest, match=f"leaves out message {index}, of the role '{role}'") as caught:
        made(source).render(messages)
    assert (caught.value.param, caught.value.code) == (f"messages.{index}", "message_left_out")


def test_a_part_that_would_not_reach_the_model_is_an_error_that_names_it(made):
    source = """{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if loop.index < 3 %}{{ c.text }}
    {%- endif %}{% endfor %}{% endfor %}"""
    three = [{"type": "text", "text": text} for text in ("a", "b", "c")]
    with pytest.raises(InvalidRequest, match="leaves out part 2 of message 0") as caught:
        made(source).render([{"role": "user", "content": three}])
    assert caught.value.param == "messages.0.content.2"


def test_a_call_of_a_tool_is_something_of_a_message(made):
    call = {"function": {"name": "add", "arguments": "{}"}}
    with_call = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert '"name": "add"' in made(templates.LLAMA3).render([USER, with_call, {"role": "tool", "content": "4"}])
    with pytest.raises(InvalidRequest, match="leaves out message 1"):
        made(BRANCHES).render([USER, with_call, USER])


def test_empty_content_is_nothing_to_leave_out(made):
    assert made(NO_SYSTEM).render([{"role": "system", "content": ""}, USER]) == "hello there|"
    assert made(OVER_PARTS).render([USER, {"role": "assistant", "content": ""}]) == "user: hello there|assistant: |"


def test_thoughts_that_a_template_drops_by_design_are_no_error(made):
    thinking = {"role": "assistant", "content": "<think>hm</think>\n\n", "reasoning_content": "hm"}
    assert "hm" not in made(templates.QWEN3).render([USER, thinking, USER])


def test_long_conversations_are_checked_in_linear_time(made):
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 2000
    text = made(TEXT).render([*talk, USER])
    assert text.count("|") == 4001
    with pytest.raises(InvalidRequest, match="leaves out message 4000"):
        made(BRANCHES).render([*talk, {"role": "tool", "content": "x"}])


CALLING = """{% for m in messages %}{% if 'tool_calls' in m %}{{ m.role }} calls {{ m.tool_calls[0].function.name }}
{{- m.tool_calls[0].function.arguments|tojson }}|{% else %}{{ m.role }}: {{ m.content|trim }}|{% endif %}{% endfor %}"""


@pytest.mark.parametrize("nothing", [[], None])
def test_an_answer_that_called_no_tool_is_no_call(made, nothing):
    answer = {"role": "assistant", "content": "yes", "tool_calls": nothing, "function_call": None}
    assert made(CALLING).render([SAFE, answer]) == "user: is this safe|assistant: yes|"


@pytest.mark.parametrize("message", [{"role": "assistant", "content": None}, {"role": "assistant"}])
@pytest.mark.parametrize("source", [CALLING, TEXT, TEXT_PRINTED, OVER_PARTS])
def test_no_content_is_written_as_nothing(made, source, message):
    assert made(source).render([SAFE, message, SAFE]).split("|")[1].strip() == "assistant:"


def calling(*names, arguments="{}", content=None):
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name in names]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def test_a_call_without_arguments_has_an_empty_object_of_them(made):
    assert made(CALLING).render([SAFE, calling("look", arguments="")]) == "user: is this safe|assistant calls look{}|"


@pytest.mark.parametrize(
    ("source", "message", "param"),
    [
        (CALLING, calling("look", "listen"), "messages.1.tool_calls.1"),
        (TEXT, calling("look", content="one moment"), "messages.1.tool_calls.0"),
    ],
    ids=["only the first call is written", "only the text is written"],
)
def test_a_call_that_would_not_reach_the_model_is_an_error_that_names_it(made, source, message, param):
    with pytest.raises(InvalidRequest) as caught:
        made(source).render([SAFE, message])
    assert (caught.value.code, caught.value.param) == ("message_left_out", param)
