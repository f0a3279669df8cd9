"""An answer is charged by what was made of it, whoever counts: usage, continuous usage, token ids, or an estimate."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec import Raw

from powerband.gateway.proxy.client_request import ClientRequest
from powerband.gateway.proxy.stream_state import StreamState
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.token_estimates import TextTokenCount, TokenEstimates, call_text
from powerband.openai.chunks import read_chunk

WORDS = "word " * 10  # ten tokens


def story_of(engine: str = "trtllm", *, estimates: TokenEstimates | None = None, **fields: Any) -> StreamState:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
    client_request = ClientRequest(msgspec.json.encode(body), "completions" if "prompt" in fields else "chat")
    state = StreamState(client_request, "m", estimates)
    state.begin(replica(engine))
    return state


def replica(engine: str) -> ReplicaAddress:
    return ReplicaAddress(id="r", url="http://r:1", model="m", engine=engine)  # type: ignore[arg-type]  # as in a file


def chunk(delta: dict[str, Any] | None, *, index: int = 0, usage: Any = None, **choice: Any) -> bytes:
    choices = [] if delta is None else [{"index": index, "delta": delta, "finish_reason": None, **choice}]
    return msgspec.json.encode({"id": "x", "model": "m", "choices": choices, "usage": usage})


def usage(completion: int, prompt: int = 7) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def tell(state: StreamState, *chunks: bytes) -> list[Any]:
    """What the client reads."""
    told = b"".join(state.process_event(data, 0.0) for data in chunks)
    return [msgspec.json.decode(one.removeprefix(b"data: ")) for one in told.split(b"\n\n") if one]


def test_chunks_of_many_tokens_are_charged_by_their_text() -> None:
    state = story_of()
    tell(state, *[chunk({"content": WORDS})] * 10)
    _, _, output = state.tokens.final_usage()
    assert 100 <= output <= 130
    assert state.tokens.is_estimate


def test_a_chunk_is_a_token_at_least() -> None:
    state = story_of()
    tell(state, *[chunk({"content": "a"})] * 40)
    assert state.tokens.final_usage()[2] == 40


@pytest.mark.parametrize("engine", ["openai", "llamacpp"])
def test_a_stream_of_letters_is_not_taken_for_one_of_too_many_tokens(engine: str) -> None:
    state = story_of(engine, max_tokens=200)
    seen = tell(state, *[chunk({"content": "a"})] * 800, chunk(None, usage=usage(200)))
    assert len(seen) == 800
    assert not state.tokens.has_too_many
    assert state.tokens.final_usage()[2] == 200


def test_text_that_no_such_number_of_tokens_can_have_is_too_much() -> None:
    state = story_of("openai", max_tokens=8)
    tell(state, chunk({"content": " " * 128 * 8}))
    assert not state.tokens.has_too_many
    tell(state, chunk({"content": " " * 256 * 80}))
    assert state.tokens.has_too_many


@pytest.mark.parametrize(
    "delta",
    [
        {"reasoning_content": WORDS},
        {"reasoning": WORDS},
        {"tool_calls": [{"index": 0, "function": {"arguments": WORDS}}]},
    ],
    ids=["reasoning_content", "reasoning", "tool_calls"],
)
def test_thoughts_and_calls_of_tools_are_text_too(delta: dict[str, Any]) -> None:
    state = story_of()
    tell(state, *[chunk(delta)] * 10)
    assert 100 <= state.tokens.final_usage()[2] <= 130


@pytest.mark.parametrize(
    "text", ["漢字仮名交文" * 20, "Привет, мир. " * 10, "🙂" * 30], ids=["cjk", "cyrillic", "emoji"]
)
def test_other_scripts_are_not_estimated_low(text: str) -> None:
    """In GPT-4o's and Llama 3's vocabularies: 0.7 tokens a Chinese character, 0.3 a Cyrillic one, 1 an emoji."""
    tokens = sum(
        0.7 if char >= "一" and char < "\U00010000" else 0.3 if char > "\x7f" and char < "一" else 1 for char in text
    )
    tokens = min(tokens, len(text))
    assert TextTokenCount(TokenEstimates()).add(text) >= 0.9 * tokens


def test_continuous_usage_is_asked_for_where_ids_are_not_told_and_kept_from_clients_that_did_not_ask() -> None:
    for engine, fields in (("sglang", {"continuous_usage_stats": True}), ("trtllm", {"continuous_usage_stats": True})):
        state = story_of(engine, stream_options={"include_usage": True})
        sent = msgspec.json.decode(state._client_request.upstream_body(replica(engine), "anonymous"))
        assert sent["stream_options"] == {"include_usage": True, **fields}
        seen = tell(state, chunk({"content": WORDS}, usage=usage(10)), chunk(None, usage=usage(12)))
        assert [one.get("usage") for one in seen] == [None, usage(12)]
    sent = msgspec.json.decode(story_of("vllm")._client_request.upstream_body(replica("vllm"), "anonymous"))
    assert sent["stream_options"] == {"include_usage": True}


def test_who_leaves_is_charged_by_the_last_usage_of_every_choice() -> None:
    """vLLM's and SGLang's usage in a chunk is of that chunk's choice alone."""
    state = story_of("sglang", n=2)
    tell(state, *(chunk({"content": WORDS}, index=i % 2, usage=usage(10 * (i // 2 + 1))) for i in range(10)))
    assert state.tokens.final_usage() == (7, 0, 100)
    assert not state.tokens.is_estimate
    tell(state, chunk(None, usage=usage(104)))
    assert state.tokens.final_usage() == (7, 0, 104)


def test_usage_that_comes_first_is_not_all() -> None:
    """Some translate from services that say the prompt's size, and one token, when an answer begins."""
    state = story_of()
    tell(state, chunk({"content": "a"}, usage=usage(1)), *[chunk({"content": WORDS})] * 10)
    assert state.tokens.final_usage()[0] == 7
    assert 100 <= state.tokens.final_usage()[2] <= 135
    assert state.tokens.is_estimate


def test_usage_of_zero_is_none() -> None:
    state = story_of()
    tell(state, *[chunk({"content": WORDS}, usage=usage(0, 0))] * 10)
    assert state.tokens.final_usage()[2] >= 100
    tell(state, chunk(None, usage=usage(100)))
    assert state.tokens.final_usage() == (7, 0, 100)


def test_ids_are_counted_of_every_choice() -> None:
    state = story_of("vllm", n=2)
    sent = msgspec.json.decode(state._client_request.upstream_body(replica("vllm"), "anonymous"))
    assert sent["return_token_ids"] is True
    chunks = [
        chunk({"content": WORDS}, index=i % 2, token_ids=list(range(10)), prompt_token_ids=[1, 2]) for i in range(10)
    ]
    seen = tell(state, *chunks)
    assert state.tokens.final_usage() == (2, 0, 100)
    assert not state.tokens.is_estimate
    assert not any("token_ids" in one["choices"][0] for one in seen)


def test_whole_answers_without_usage_are_estimated() -> None:
    body = {"model": "m", "choices": [{"index": 0, "message": {"content": WORDS * 10}, "finish_reason": "stop"}]}
    state = story_of(stream=False)
    state.process_whole(read_chunk(msgspec.json.encode(body)), replica("trtllm"))
    assert 100 <= state.tokens.final_usage()[2] <= 130
    assert state.tokens.is_estimate
    state = story_of(stream=False)
    state.process_whole(read_chunk(msgspec.json.encode({**body, "usage": usage(99)})), replica("trtllm"))
    assert (state.tokens.final_usage(), state.tokens.is_estimate) == ((7, 0, 99), False)


def test_usage_that_a_client_wants_is_told_once_also_when_the_replica_leaves_it_out() -> None:
    state = story_of("sglang", stream_options={"include_usage": True})
    assert all("usage" not in one for one in tell(state, chunk({"content": WORDS}, usage=usage(10))))
    assert b'"completion_tokens":10' in state.final_events()
    tell(state, chunk(None, usage=usage(10)))
    assert state.final_events() == b"data: [DONE]\n\n"


def test_a_response_that_was_not_waited_for_is_charged_at_the_measured_pace() -> None:
    estimates = TokenEstimates()
    for _ in range(50):
        estimates.learn_pace(100, 2.0, has_prompt=False)
    assert estimates.tokens_per_s == pytest.approx(50.0)
    assert estimates.of_whole(3.0, choices=2, limit=None) == 300
    assert estimates.of_whole(3.0, choices=2, limit=40) == 80


def test_short_responses_and_long_prompts_do_not_change_the_pace() -> None:
    estimates = TokenEstimates()
    for _ in range(50):
        estimates.learn_pace(1, 20.0, has_prompt=False)
        estimates.learn_pace(64, 20.0, has_prompt=True)
    assert estimates.tokens_per_s == 100.0
    estimates.learn_pace(4000, 0.01, has_prompt=True)  # from a cache
    assert estimates.tokens_per_s <= 1000.0


def test_what_one_stream_shows_of_its_tokens_does_not_change_what_another_pays() -> None:
    estimates = TokenEstimates()
    for text, tokens in (("ok", 400), (" " * 4000, 40)):
        for _ in range(40):  # reasoning that is left out; runs of blanks
            state = story_of("openai", estimates=estimates)
            tell(state, chunk({"content": text}, finish_reason="stop"), chunk(None, usage=usage(tokens)))
            state.tokens.teach(estimates, tokens, 0.0)
        state = story_of("openai", estimates=estimates)
        tell(state, *[chunk({"content": WORDS})] * 10)
        assert 100 <= state.tokens.final_usage()[2] <= 130


def test_a_stream_that_is_left_at_a_server_that_sends_letters_is_not_charged_by_the_letter() -> None:
    estimates = TokenEstimates()
    for _ in range(40):
        state = story_of("openai", estimates=estimates)
        tell(state, *[chunk({"content": "a"})] * 400, chunk(None, usage=usage(100)))
        state.tokens.teach(estimates, 100, 0.0)
    state = story_of("openai", estimates=estimates)
    tell(state, *[chunk({"content": "a"})] * 400)
    assert 100 <= state.tokens.final_usage()[2] <= 130


def test_calls_of_tools_of_no_known_form_are_counted_all_the_same() -> None:
    assert call_text(Raw(b'[{"function": {"name": "f", "arguments": "{}"}}, {}]')) == "f{}"
    assert call_text(Raw(b'["x"]')) == '["x"]'


def test_usage_comes_last_also_where_chunks_have_it_and_its_own_is_lost() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    state = story_of("vllm", stream_options=options)
    state.process_event(
        chunk({"content": "a"}, usage={"prompt_tokens": 1, "completion_tokens": 1}, finish_reason="stop"), 0.0
    )
    assert b'"completion_tokens":1' in state.final_events()
    state.process_event(chunk(None, usage={"prompt_tokens": 1, "completion_tokens": 1}), 0.0)
    assert b"usage" not in state.final_events()


def test_each_choice_is_opened_once_also_when_all_is_begun_again() -> None:
    state = story_of("vllm", n=2)
    opening = {"role": "assistant", "content": ""}
    assert state.process_event(chunk(opening, index=0), 0.0)
    state.resume(kept=0)
    assert state.process_event(chunk(opening, index=0), 0.0) == b""
    assert state.process_event(chunk(opening, index=1), 0.0)


def test_a_huge_id_is_not_repeated_after_a_failover() -> None:
    state = story_of("vllm")
    huge = {"id": "i" * 100_000, "model": "m", "choices": [{"index": 0, "delta": {"content": "a"}}]}
    state.process_event(msgspec.json.encode(huge), 0.0)
    state.resume(kept=0)
    assert len(state.process_event(chunk({"content": "b"}), 0.0)) < 1000
