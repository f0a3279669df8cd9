"""Chat templates: equal to transformers' rendering, bounded in time and size, closed to hostile templates."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import templates
from tokenizers_for_tests import byte_level, save

from powerband.errors import EnvironmentFault, InvalidRequest
from powerband.text import template_process
from powerband.text.chat_template import ChatTemplate
from powerband.text.tokenizer import Tokenizer
from powerband.worker_process import WorkerLimits, WorkerProcess

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": " What is 2+2? <b>&'日本' "}
TALK = [USER, {"role": "assistant", "content": "It is 4."}, {"role": "user", "content": "And 3+3?"}]
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds <two>", "parameters": {"type": "object", "properties": {"a": {}}}},
}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": "é"}}}]}
QUICK = WorkerLimits(seconds=0.5)


@pytest.fixture(scope="module")
def made():
    """ChatTemplate by source, made once, closed at the end."""
    cache = {}

    def make(source):
        if source not in cache:
            cache[source] = ChatTemplate({"default": source}, VARIABLES)
        return cache[source]

    yield make
    for template in cache.values():
        template.close()


def transformers_render(source, messages, **options):
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template([messages], chat_template=source, **VARIABLES, **options)[0][0]


CASES = [(name, TALK, {}) for name in templates.ALL]
CASES += [(name, [{"role": "system", "content": "Be brief."}, *TALK], {}) for name in templates.ALL if name != "gemma"]
CASES += [(name, [USER, CALL, {"role": "tool", "content": "4"}], {"tools": [TOOL]}) for name in ["llama3", "qwen3"]]
CASES += [("gemma", [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], {})]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(("name", "messages", "options"), CASES)
def test_rendering_equals_transformers(made, name, messages, options, add_generation_prompt):
    source = templates.ALL[name]
    options = options | {"add_generation_prompt": add_generation_prompt}
    assert made(source).render(messages, **options) == transformers_render(source, messages, **options)


@pytest.mark.parametrize(
    "block",
    [
        "{% set q = 1 %}{% generation %}{% set q = 2 %}{{ q }}{% endgeneration %}{{ q }}",
        "{% generation %}{% set q = 1 %}{{ bos_token }}{% endgeneration %}{{ q }}",
        "{% set n = namespace(q=1) %}{% generation %}{% set n.q = 2 %}{% endgeneration %}{{ n.q }}",
        "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.role }}"
        "{% set m = 1 %}{% endgeneration %}{{ m.role }}{% endfor %}",
    ],
)
def test_variables_of_a_generation_block_equal_transformers(made, block):
    source = block + "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert made(source).render(TALK) == transformers_render(source, TALK)


@pytest.mark.parametrize("name", templates.ALL)
@pytest.mark.parametrize("ending", ["It", "It "])
def test_continuing_the_final_message_equals_transformers(made, name, ending):
    source, messages = templates.ALL[name], [*TALK, {"role": "assistant", "content": ending}]
    ours = made(source).render(messages, continue_final_message=True, add_generation_prompt=False)
    assert ours == transformers_render(source, messages, continue_final_message=True)


def test_template_kwargs_reach_the_template(made):
    text = made(templates.QWEN3).render(TALK, template_kwargs={"enable_thinking": False})
    assert text == transformers_render(templates.QWEN3, TALK, add_generation_prompt=True, enable_thinking=False)
    assert text.endswith("</think>\n\n")


@pytest.mark.parametrize("name", ["messages", "bos_token", "raise_exception", "_x", "a.b", "namespace"])
def test_template_kwargs_cannot_shadow(made, name):
    with pytest.raises(InvalidRequest, match="may not set") as caught:
        made(templates.CHATML).render(TALK, template_kwargs={name: "x"})
    assert caught.value.param == f"chat_template_kwargs.{name}"


def test_template_kwargs_must_be_simple(made):
    with pytest.raises(InvalidRequest, match="must be a string, number"):
        made(templates.CHATML).render(TALK, template_kwargs={"x": {"y": 1}})


def test_the_templates_own_words_reach_the_user(made):
    with pytest.raises(InvalidRequest, match="Conversation roles must alternate user/assistant") as caught:
        made(templates.GEMMA).render([USER, USER])
    assert caught.value.param == "messages"


def test_text_parts_are_joined_for_templates_that_take_strings(made):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text = made(templates.CHATML).render([{"role": "user", "content": parts}])
    assert "user\none\ntwo<|im_end|>" in text


def test_an_image_is_refused_by_name(made):
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(InvalidRequest, match="'image_url' is not supported") as caught:
        made(templates.CHATML).render([message])
    assert caught.value.param == "messages.0.content.0"


def test_tool_arguments_as_json_text_are_parsed(made):
    as_text = json.loads(json.dumps(CALL))
    as_text["tool_calls"][0]["function"]["arguments"] = '{"a": "é"}'
    render = made(templates.LLAMA3).render
    assert render([USER, as_text]) == render([USER, CALL])


BOMBS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "repeat": "{% set n = 10**10 %}{{ ('x' * n) | length }}",
    "constant": "{% if messages %}{{ 'x' * 10**10 }}{% endif %}",
    "output": "{% for i in range(99999) %}{{ 'y' * 999 }}{% endfor %}",
    "power": "{% set n = 9**9 %}{{ (9**n) % 7 }}",
    "indent": "{% set n = 10**9 %}{{ [[1]] | tojson(indent=n) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_in_an_error_soon(name):
    begin = time.monotonic()
    with pytest.raises((InvalidRequest, EnvironmentFault), match="chat template"):
        ChatTemplate({"default": BOMBS[name]}, limits=QUICK).render(TALK)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stopped_takes_no_request_with_it(number):
    limits = WorkerLimits(seconds=0.2)
    workers = template_process.TemplateProcesses({"default": "{{ messages[0].content }}"}, {}, limits)
    try:
        [worker] = workers._pool._idle
        os.kill(worker._process.pid, number)
        context = {"messages": [{"role": "user", "content": "here"}]}
        assert workers.render("default", context, 100) == ("here", None)
    finally:
        workers.close()


def test_others_are_served_while_one_rendering_hangs():
    source = "{% if messages|length > 9 %}" + BOMBS["nested"] + "{% endif %}{{ messages[0].content|trim }}"
    template = ChatTemplate({"default": source}, limits=WorkerLimits(seconds=2.0, max_workers=2))
    with ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(template.render, [USER] * 10)
        for _ in range(20):
            assert template.render([USER]) == USER["content"].strip()
        assert not hanging.done()
        with pytest.raises(InvalidRequest, match="more than 2 s"):
            hanging.result()
    assert template.render([USER]) == USER["content"].strip()
    template.close()


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f')|attr('mro') }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['sys'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment.from_string('x') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ '{a.__class__}'.format_map({'a': messages}) }}",
    "{{ ('{0.__class__}'|attr('format'))(messages) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(messages) }}",
    "{{ ['{0.__class__}']|map('format', messages)|list }}",
    "{{ [messages]|map(attribute='__class__')|list }}",
    "{{ [raise_exception]|map(attribute='__globals__')|map('string')|list }}",
    "{{ [messages]|groupby('__class__') }}",
    "{% set ns = namespace(__class__='x') %}{{ ns }}",
    "{{ messages.append({'role': 'x'}) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends 'x' %}",
    "{{ (messages|selectattr('__class__')|list)[0].__class__ }}",
]
LEAKS = ("<class", "<function", "builtins", "root:", "uid=", "<module")


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_reach_nothing(source):
    """Either an error that shows no object of Python's, or a text without one."""
    try:
        shown = ChatTemplate({"default": source}, limits=QUICK).render(TALK)
    except (InvalidRequest, EnvironmentFault) as error:
        shown = str(error)
    assert not any(leak in shown for leak in LEAKS)


OBJECTS = [
    "raise_exception",
    "strftime_now",
    "namespace",
    "range",
    "dict",
    "lipsum",
    "cycler",
    "cycler('a')",
    "joiner",
    "joiner()",
    "messages[0].get",
    "messages[0]['get']",
    "messages[0].content.split",
    "messages|attr('count')",
    "messages|map(attribute='role')",
    "messages|map(attribute='get')|list",
    "messages|selectattr('role')",
    "messages|reverse",
    "messages|batch(1)",
    "messages[0]|items",
    "[messages[0].get, 1]",
    "{'a': messages[0].get}",
    "'' ~ messages[0].get",
    "messages[0].get|string",
    "messages[0].get|pprint",
    "'%s'|format(messages[0].get)",
    "'%s' % messages[0].get",
    "'%r' % raise_exception",
    "'{}'.format(messages[0].get)",
    "'{0.get}'.format(messages[0])",
    "'{0!r}'.format(raise_exception)",
    "[raise_exception]|join",
    "raise_exception(messages[0].get)",
    "messages[0].get + 1",
    "messages[raise_exception]",
    "messages[0].get._function",
    "messages[0].get.foo",
    "(messages|map('upper')).gi_frame",
    "namespace(a=messages[0].get)",
    "self",
    "messages[0].keys().mapping",
    "messages[0].values()",
    "strftime_now(raise_exception)",
    "raise_exception|tojson",
    "messages|tojson(default=raise_exception)",
    "messages|sort(attribute='get')",
    "messages|groupby('get')",
]


@pytest.mark.parametrize("expression", OBJECTS)
def test_no_object_shows_its_address(expression):
    source = "{% macro m() %}{% endmacro %}{{ m }}{% for x in messages %}{{ loop }}{{ loop.cycle }}{% endfor %}"
    source += "{% block b %}{% endblock %}{{ self.b }}{{ messages[0].content }}{{ " + expression + " }}"
    try:
        shown = ChatTemplate({"default": source}, limits=QUICK).render([USER])
    except (InvalidRequest, EnvironmentFault) as error:
        shown = str(error)
    assert "0x" not in shown
    assert not any(leak in shown for leak in (*LEAKS, "powerband"))


def test_methods_filters_and_functions_work_as_elsewhere(made):
    source = """{% set ns = namespace(n=0) %}{% set c = cycler('a', 'b') %}{% set comma = joiner(', ') %}
    {%- for m in messages %}{% set ns.n = ns.n + 1 %}{{ comma() }}{{ c.next() }}{{ m.get('role', 'x').upper() }}
    {%- for key, value in m.items() %}{{ key }}={{ value.split(' ')[0] }}{% endfor %}{{ loop.cycle('o', 'e') }}
    {{- ' %s {0} '.format(m['content'].strip()) % ns.n }}{% endfor %}
    {{- messages|map(attribute='role')|unique|join('+') }}
    {{- messages|selectattr('role', 'equalto', 'user')|list|length }}
    {{- (messages|reverse|first).role }}{{ range(3)|list }}{{ dict(a=1).items()|list }}
    {{- messages|map('length')|sum }}"""
    assert made(source).render(TALK) == transformers_render(source, TALK, add_generation_prompt=True)


def test_a_worker_sees_no_secrets(monkeypatch):
    monkeypatch.setenv("POWERBAND_API_KEY", "secret")
    worker = WorkerProcess(
        "powerband.text.template_worker", {"sources": {"default": "x"}, "variables": {}}, WorkerLimits()
    )
    environment = open(f"/proc/{worker._process.pid}/environ").read()  # noqa: SIM115
    worker.kill()
    assert "secret" not in environment


def test_a_broken_template_is_refused_when_loaded():
    with pytest.raises(EnvironmentFault, match=r"cannot be used: line 2: .*--chat-template"):
        ChatTemplate({"default": "a\n{% if %}"})


def test_templates_are_found_where_checkpoints_keep_them(tmp_path):
    def saying(word):
        return word + "{% for m in messages %} {{ m.content }}{% endfor %}"

    hello = [{"role": "user", "content": "hello"}]
    named = [{"name": "default", "template": saying("plain")}, {"name": "tool_use", "template": saying("tools")}]
    in_config = ChatTemplate.load(Tokenizer.load(save(byte_level(), tmp_path, chat_template=named)))
    assert in_config.render(hello) == "plain hello"
    assert in_config.render(hello, tools=[TOOL]) == "tools hello"
    (tmp_path / "chat_template.jinja").write_text(saying("file"))
    in_file = ChatTemplate.load(Tokenizer.load(tmp_path))
    assert in_file.render(hello) == "file hello"
    (tmp_path / "mine").write_text(saying("{{ bos_token }}mine"))
    asked = ChatTemplate.load(Tokenizer.load(save(byte_level(), tmp_path, bos_token="<s>")), tmp_path / "mine")
    assert asked.render(hello) == "<s>mine hello"
    for template in (in_config, in_file, asked):
        template.close()


def test_a_template_that_has_no_end_is_not_read(tmp_path):
    save(byte_level(), tmp_path)
    (tmp_path / "chat_template.jinja").write_text("main")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "x.jinja").symlink_to("/dev/zero")
    assert ChatTemplate.load(Tokenizer.load(tmp_path)) is not None
    with pytest.raises(EnvironmentFault, match=r"/dev/zero cannot be read: .* larger than 1 MiB"):
        ChatTemplate.load(Tokenizer.load(tmp_path), "/dev/zero")


def test_a_checkpoint_without_a_template_gives_none(tmp_path):
    assert ChatTemplate.load(Tokenizer.load(save(byte_level(), tmp_path))) is None


def test_a_rendering_is_cheap_once_warm(made):
    render = made(templates.QWEN3).render
    render(TALK)
    times_s = []
    for _ in range(50):
        begin = time.perf_counter()
        render(TALK)
        times_s.append(time.perf_counter() - begin)
    assert sorted(times_s)[5] < 1e-3


@pytest.mark.parametrize(
    "template",
    [5, True, [1], ["x"], [{"name": "default"}], [{"name": 1, "template": "x"}], [{"name": "default", "template": 5}],
     {"default": 5}, "\ud800", [{"name": "default", "template": "a\udfff"}]],
    ids=ascii,
)  # fmt: skip
def test_a_template_of_another_shape_is_refused(template, tmp_path):
    tokenizer = Tokenizer.load(save(byte_level(), tmp_path, chat_template=template))
    with pytest.raises(EnvironmentFault) as caught:
        ChatTemplate.load(tokenizer)
    assert caught.value.code == "chat_template_invalid"


def test_named_templates_may_be_a_table(tmp_path):
    table = {"default": "a{% for m in messages %}{{ m.content }}{% endfor %}", "tool_use": "b"}
    template = ChatTemplate.load(Tokenizer.load(save(byte_level(), tmp_path, chat_template=table)))
    try:
        assert template.render([{"role": "user", "content": "x"}]) == "ax"
    finally:
        template.close()
