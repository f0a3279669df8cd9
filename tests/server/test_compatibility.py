"""What clients of other servers send: taken where it can be, ignored where it changes nothing, else refused by name."""

from __future__ import annotations

import time
import typing
from pathlib import Path
from typing import Any

import msgspec
import openai.types.chat.completion_create_params as openai_chat
import openai.types.completion_create_params as openai_text
import pytest
from servers_for_tests import RunningServer, running_server

from powerband.errors import InvalidRequest
from powerband.server import protocol
from powerband.server.compatibility import Amendment
from powerband.server.protocol import ChatRequest, CompletionRequest, ReasoningSwitch, TokenizeRequest
from powerband.web.body import decode

HI: list[Any] = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat(*, ignores_unknown: bool = False, **fields: Any) -> tuple[ChatRequest, list[str]]:
    """The request as it is understood, and the fields that were ignored."""
    amendment = Amendment(ChatRequest, "demo", ignores_unknown=ignores_unknown)
    return decode(msgspec.json.encode({"messages": HI, **fields}), ChatRequest, amendment), amendment.ignored


def text(**fields: Any) -> CompletionRequest:
    amendment = Amendment(CompletionRequest, "demo", ignores_unknown=False)
    return decode(msgspec.json.encode({"prompt": "hi", **fields}), CompletionRequest, amendment)


def message(**fields: Any) -> protocol.Message:
    """A message in the history, as it is understood."""
    return chat(messages=[*HI, {"role": "assistant", **fields}, *HI])[0].messages[1]


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        ({"reasoning": {"effort": "high", "exclude": True}}, ReasoningSwitch(effort="high", exclude=True)),
        ({"reasoning": {"enabled": False}}, ReasoningSwitch(enabled=False)),
        ({"reasoning": {"max_tokens": 20, "summary": "auto"}}, ReasoningSwitch(max_tokens=20, summary="auto")),
        ({"reasoning": True}, ReasoningSwitch(enabled=True)),
        ({"reasoning": "low"}, ReasoningSwitch(effort="low")),
        ({"thinking": {"type": "disabled"}}, ReasoningSwitch(enabled=False)),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, ReasoningSwitch(enabled=True, max_tokens=9)),
        ({"thinking": {"type": "adaptive", "budget_tokens": 9}}, ReasoningSwitch(max_tokens=9)),
        ({"thinking": False}, ReasoningSwitch(enabled=False)),
        ({"enable_thinking": True, "thinking_budget": 7}, ReasoningSwitch(enabled=True, max_tokens=7)),
        ({"enable_thinking": False}, ReasoningSwitch(enabled=False)),
        ({"think": False}, ReasoningSwitch(enabled=False)),
        ({"think": "low"}, ReasoningSwitch(effort="low")),
        ({"enable_thinking": False, "reasoning": {"enabled": True}}, ReasoningSwitch(enabled=True)),
    ],
)
def test_switches_of_reasoning_as_other_servers_have_them_mean_the_same(fields: Any, meant: ReasoningSwitch) -> None:
    body, ignored = chat(**fields)
    assert (body.reasoning, ignored) == (meant, [])


def test_what_is_no_switch_of_reasoning_is_ignored_or_named() -> None:
    body, ignored = chat(thinking={"type": "sometimes"}, think="a lot", enable_thinking=None)
    assert (body.reasoning, sorted(ignored)) == (None, ["think", "thinking"])
    assert refusal(reasoning={"effort": "a lot"}).param == "reasoning.effort"
    assert refusal(reasoning={"efort": "low"}).param == "reasoning.efort"


def test_what_a_client_parsed_itself_may_come_back() -> None:
    function = {"name": "f", "arguments": "{}", "parsed_arguments": {}}
    call = {"id": "1", "type": "function", "function": function, "index": 0}
    assert message(content="{}", parsed={"a": 1}) == message(content="{}")
    assert message(content=None, tool_calls=[call]).tool_calls[0].function.arguments == "{}"  # type: ignore[index]


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
ASKED: list[tuple[str, Any, str]] = [
    ("functions", [{"name": "f"}], "Use 'tools'."),
    ("function_call", {"name": "f"}, "Use 'tool_choice'."),
    ("guided_json", {"type": "object"}, "Send 'structured_outputs' with 'json'."),
    ("guided_regex", "a+", "Send 'structured_outputs' with 'regex'."),
    ("ebnf", 'root ::= "a"', "Send 'structured_outputs' with 'grammar'."),
    ("modalities", ["text", "audio"], "Output other than text"),
    ("audio", {"voice": "alloy", "format": "mp3"}, "Audio"),
    ("prediction", {"type": "content", "content": "x"}, "Predicted output"),
    ("verbosity", "low", "Verbosity"),
    ("web_search_options", {}, "Web search"),
    ("use_beam_search", True, "Beam search"),
    ("documents", [{"text": "a"}], "Write them into a message."),
    ("chat_template", "{{ messages }}", "--chat-template FILE"),
    ("suffix", "end", "suffix"),
    ("echo", True, "Repeating the last message"),
    ("typical_p", 0.5, "sampling"),
    ("repeat_penalty", 1.1, "Use 'repetition_penalty'."),
    ("truncation_side", "right", "Truncation"),
]


@pytest.mark.parametrize("ignores_unknown", [False, True])
@pytest.mark.parametrize(("name", "value", "words"), ASKED)
def test_a_feature_that_is_missing_is_refused_by_name(name: str, value: Any, words: str, ignores_unknown: bool) -> None:
    """Also where unknown fields are ignored: the answer would be another than the one that was asked for."""
    error = refusal(**{name: value}, ignores_unknown=ignores_unknown)
    assert (error.code, error.param) == ("unsupported_parameter", name)
    assert f"'{name}' is not supported" in error.message
    assert words in str(error)


@pytest.mark.parametrize("name", sorted(protocol.NOT_SUPPORTED))
def test_a_feature_that_is_not_asked_for_is_no_error(name: str) -> None:
    values = [None] if name in protocol.ALWAYS_ASKS else [None, False, "", "none", [], {}]
    for value in (*values, *protocol.NOT_SUPPORTED[name].neutral):
        if name not in ChatRequest.__struct_fields__ or name not in protocol.OWN_FIELDS:
            assert chat(**{name: value})[1] == []
        if name != "echo" or value in (None, False):
            text(**{name: value})


def test_null_is_the_default_of_every_field() -> None:
    for name in ChatRequest.__struct_fields__:
        if name != "messages":
            assert chat(**{name: None}) == chat()
    for name in CompletionRequest.__struct_fields__:
        if name != "prompt":
            assert text(**{name: None}) == text()
    for name in protocol.StreamOptions.__struct_fields__:
        assert chat(stream_options={name: None}) == chat(stream_options={})
    assert chat(a_field_of_next_year=None) == chat()
    assert message(content="x", images=None, thinking=None, tool_calls=None) == message(content="x")


def test_every_field_of_openais_own_schema_is_known() -> None:
    known = {*protocol.NOT_SUPPORTED, *protocol.IGNORED}
    for params, kind in (
        (openai_chat.CompletionCreateParamsBase, ChatRequest),
        (openai_text.CompletionCreateParamsBase, CompletionRequest),
    ):
        assert set(typing.get_type_hints(params)) <= known | {*kind.__struct_fields__}


FROM_VLLM: dict[str, Any] = {
    **{"request_id": "r1", "session_id": "s1", "mm_processor_kwargs": {"fps": 1}},
    **{"kv_transfer_params": {"a": 1}, "vllm_xargs": {"a": 1}, "length_penalty": 1.0, "keep_alive": "5m"},
    **{"spaces_between_special_tokens": True, "cache_prompt": True, "options": {"num_ctx": 4096}},
    **{"provider": {"order": ["a"]}, "early_stopping": False},
}


def test_fields_that_change_nothing_here_are_ignored_and_named() -> None:
    request, ignored = chat(**FROM_VLLM)
    assert request == chat()[0]
    assert ignored == list(FROM_VLLM)


def test_the_pages_list_what_is_ignored_and_what_is_refused() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    for name in (
        *protocol.IGNORED,
        *protocol.MESSAGE_IGNORED,
        *protocol.PART_IGNORED,
        *protocol.TOOL_IGNORED,
        *protocol.NOT_SUPPORTED,
    ):
        assert f"`{name}`" in page, name


def test_an_unknown_field_is_an_error_unless_the_server_ignores_them() -> None:
    error = refusal(temprature=1)
    assert (error.code, error.param, error.hint) == ("unknown_parameter", "temprature", "Did you mean 'temperature'?")
    assert "--unknown-fields ignore" in refusal(zzz=1).hint
    assert refusal(messages=[{"role": "user", "content": "a", "nam": "b"}]).param == "messages.0.nam"
    request, ignored = chat(
        temprature=1,
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi", "lang": "en"}], "mood": 1}],
        ignores_unknown=True,
    )
    assert ignored == ["temprature", "messages.mood", "messages.content.lang"]
    assert request == chat(messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}])[0]


def test_a_prompt_of_another_path_is_refused_with_that_path() -> None:
    """As from a client whose URL has the other path."""
    assert refusal(prompt="hi").hint == "It is for /v1/completions."
    assert refusal(input="hi").hint == "It is for /v1/responses or /v1/embeddings."
    with pytest.raises(InvalidRequest, match="Unknown field 'messages'") as caught:
        text(messages=HI)
    assert caught.value.hint == "It is for /v1/chat/completions."


def test_any_number_of_unknown_fields_takes_time_in_proportion() -> None:
    def cpu_s(count: int) -> float:
        fields = {f"k{i}": 1 for i in range(count)}
        start_s = time.process_time()
        assert len(chat(**fields, ignores_unknown=True)[1]) == 64
        return time.process_time() - start_s

    assert min(cpu_s(64_000) for _ in range(3)) < 64 * min(cpu_s(4_000) for _ in range(3))


def test_histories_of_other_servers_are_taken() -> None:
    assert message(content="x", reasoning="why").reasoning_content == "why"  # vLLM's and OpenRouter's name
    assert message(content="x", thinking="why").reasoning_content == "why"  # Ollama's
    assert message(content="x", reasoning="new", reasoning_content="why").reasoning_content == "why"
    parts = [{"type": "thinking", "thinking": "why"}, {"type": "output_text", "text": "x", "annotations": []}]
    taken = message(content=parts)
    assert taken.reasoning_content == "why"
    assert [part.text for part in taken.content] == ["", "x"]  # type: ignore[union-attr]  # parts, as they were sent
    assert message(content=[{"type": "refusal", "refusal": "no"}]).content == [protocol.ContentPart("text", "no")]
    assert message(content=[]).content == ""
    assert message(role="function", name="f", content="x").role == "tool"
    assert message(content="x", id="msg_1", reasoning_details=[{"a": 1}], provider_specific_fields={}).content == "x"
    cached = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    request, ignored = chat(messages=[{"role": "user", "content": [cached, dict(cached)]}])
    assert request.messages[0].content == [protocol.ContentPart("text", "a")] * 2
    assert ignored == ["messages.content.cache_control"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("function_call", {"name": "f", "arguments": "{}"}, "Use 'tool_calls'."),
        ("audio", {"id": "audio_1"}, "Audio"),
        ("prefix", True, "continue_final_message"),
    ],
)
def test_what_cannot_be_taken_of_a_history_is_named(field: str, value: Any, words: str) -> None:
    error = refusal(messages=[*HI, {"role": "assistant", "content": "x", field: value}, *HI])
    assert (error.code, error.param) == ("unsupported_parameter", f"messages.1.{field}")
    assert words in str(error)


@pytest.mark.parametrize(
    ("part", "what"),
    [
        (IMAGE, "Images"),
        ({"type": "input_image", "image_url": "https://example.com/a.png"}, "Images"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "Audio"),
        ({"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}}, "Videos"),
        ({"type": "file", "file": {"file_id": "a"}}, "Files"),
    ],
)
def test_a_part_that_is_no_text_is_named(part: dict[str, Any], what: str) -> None:
    error = refusal(messages=[{"role": "user", "content": [{"type": "text", "text": "what is this?"}, part]}])
    assert (error.code, error.param) == ("unsupported_parameter", "messages.0.content.1.type")
    assert f"'messages.0.content.1' is of type {part['type']}" in error.message
    assert f"{what} are not supported: the model 'demo' takes text only." in error.message.replace("io is", "io are")


def test_values_that_openais_schema_allows_are_taken() -> None:
    assert chat(max_tokens=3.0)[0].max_tokens == 3  # JSON has one kind of number
    assert chat(stop="")[0].stop is None
    assert chat(stop=["", "a"])[0].stop == ["a"]
    for tier in ("auto", "default", "flex", "scale", "priority", "fast"):
        assert chat(service_tier=tier)[0].service_tier == tier
    chat(prompt_cache_retention="24h", stream=True, stream_options={"include_obfuscation": False})
    chat(n=128, top_p=0, logprobs=False, top_logprobs=0)
    text(max_tokens=0, best_of=1, top_p=0)
    assert text(echo=True, max_tokens=3.0).echo


def test_the_answer_names_what_was_ignored_and_the_log_does_so_once() -> None:
    with running_server("unknown_fields=ignore") as server:
        for _ in range(3):
            response = server.post(CHAT, messages=HI, max_tokens=1, keep_alive="5m", **{"a, b\r\n": 1})
            assert response.headers["x-ignored-fields"] == "keep_alive, a%2C%20b%0D%0A"
        stream = server.post(CHAT, messages=HI, max_tokens=1, stream=True, mood="x")
        assert stream.headers["x-ignored-fields"] == "mood"
        refused = server.post(CHAT, messages=HI, audio={"voice": "x"}, mood="x")
        assert refused.json()["error"]["code"] == "unsupported_parameter"
        server.process.terminate()
        assert server.process.stderr
        log = server.process.stderr.read()
    assert [log.count(f"the field '{name}'") for name in ("keep_alive", "mood")] == [1, 1]


def test_odd_values_are_answered(server: RunningServer) -> None:
    empty = server.post(COMPLETIONS, prompt="a b", max_tokens=0)
    assert empty.json()["choices"][0]["text"] == ""
    assert empty.json()["usage"]["completion_tokens"] == 0
    for prompt in ("", None):  # the beginning of a document, as at OpenAI
        assert server.post(COMPLETIONS, prompt=prompt, max_tokens=1).json()["usage"]["prompt_tokens"] == 1
    likeliest = server.post(COMPLETIONS, prompt="a b", max_tokens=2, top_p=0, temperature=1)
    assert likeliest.json()["choices"][0]["text"] == "a b"
    assert "x-ignored-fields" not in likeliest.headers
    assert len(server.post(COMPLETIONS, prompt="a", max_tokens=1, n=128).json()["choices"]) == 128


def test_a_refusal_in_the_history_is_what_the_model_said(server: RunningServer) -> None:
    def tokens(answer: dict[str, Any]) -> list[int]:
        found: list[int] = server.post("/tokenize", messages=[*HI, answer, *HI]).json()["tokens"]
        return found

    assert tokens({"role": "assistant", "content": None, "refusal": "I will not."}) == tokens(
        {"role": "assistant", "content": "I will not."}
    )


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest, TokenizeRequest])
def test_no_error_has_the_words_of_the_library(kind: type) -> None:
    wrong: list[Any] = [True, -1, 1.5, 10**30, "x" * 600, [], [[]], [None] * 5000, {}, {"a": {}}, ["", 1]]
    required: dict[str, Any] = {"messages": HI} if kind is ChatRequest else {"prompt": "a"}
    for name in kind.__struct_fields__:  # type: ignore[attr-defined]  # all are structs
        errors = [error for value in wrong if (error := problem(kind, {**required, name: value})) is not None]
        assert errors or name in ("prompt", "chat_template_kwargs")
        for error in errors:
            assert (error.param or "").split(".")[0] == name
            assert not any(word in error.message for word in ("`", "xpected", "array", " got ", "enum")), error


def problem(kind: type, body: dict[str, Any]) -> InvalidRequest | None:
    try:
        decode(msgspec.json.encode(body), kind, Amendment(kind, "demo", ignores_unknown=False))
    except InvalidRequest as error:
        return error
    return None


def test_tools_and_calls_of_other_clients_are_taken() -> None:
    function = {"name": "f", "arguments": {"a": 1}}
    taken = message(content=None, tool_calls=[{"index": 0, "function": function}])  # an index, no id: Ollama's
    assert taken.tool_calls is not None
    [call] = taken.tool_calls
    assert (call.id, call.function.arguments) == ("call_1_0", '{"a":1}')
    tool = {"type": "function", "function": {"name": "f", "parameters": None}, "cache_control": {"type": "ephemeral"}}
    request, ignored = chat(tools=[tool])
    assert request.tools is not None
    assert request.tools[0].function.name == "f"
    assert ignored == ["tools.cache_control"]
    error = refusal(tools=[{"type": "function", "function": {"name": "f", "parametres": {}}}])
    assert (error.param, error.hint) == ("tools.0.function.parametres", "Did you mean 'parameters'?")
