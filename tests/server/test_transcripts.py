"""What exactly goes over the wire, from an engine that repeats its prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest
from servers_for_tests import RunningServer

USER = {"role": "user", "content": "hi there"}


def events(server: RunningServer, path: str, **body: Any) -> list[Any]:
    """The data of every event, the last as text."""
    response = server.post(path, stream=True, **body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = response.content.decode().split("\n\n")
    assert blocks.pop() == ""
    data = [block.removeprefix("data: ") for block in blocks]
    return [json.loads(item) for item in data[:-1]] + [data[-1]]


def choices(chunks: list[Any]) -> list[dict[str, Any]]:
    return [choice for chunk in chunks if isinstance(chunk, dict) for choice in chunk["choices"]]


def test_chat_stream(server: RunningServer) -> None:
    chunks = events(
        server, "/v1/chat/completions", messages=[USER], max_tokens=4, stream_options={"include_usage": True}
    )
    heads = {(c["id"], c["object"], c["created"], c["model"], c["system_fingerprint"]) for c in chunks[:-1]}
    assert len(heads) == 1
    assert heads.pop()[1] == "chat.completion.chunk"

    def choice(delta: dict[str, str], finish: str | None = None) -> list[dict[str, Any]]:
        end = {"stop_reason": None} if finish else {}
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, **end}]

    # Four tokens: <|im_start|>, which is not text, "user", "\n", "h".
    assert [c["choices"] for c in chunks[:-1]] == [
        choice({"role": "assistant", "content": ""}),
        choice({"content": "user"}),
        choice({"content": "\n"}),
        choice({"content": "h"}),
        choice({}, "length"),
        [],
    ]
    assert [c["usage"] for c in chunks[:-1]] == [None] * 5 + [
        {
            "prompt_tokens": 11,
            "completion_tokens": 4,
            "total_tokens": 15,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
    ]
    assert chunks[-1] == "[DONE]"


def test_no_usage_unless_asked_for(server: RunningServer) -> None:
    chunks = events(server, "/v1/chat/completions", messages=[USER], max_tokens=4)
    assert all("usage" not in chunk for chunk in chunks[:-1])
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


def test_usage_with_every_chunk(server: RunningServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(server, "/v1/completions", prompt="one two three", max_tokens=3, stream_options=options)
    assert [c["usage"]["completion_tokens"] for c in chunks[:-1]] == [1, 2, 3, 3]


def test_completion_stream(server: RunningServer) -> None:
    chunks = events(server, "/v1/completions", prompt="one two three", max_tokens=3)
    found = choices(chunks)
    assert {c["object"] for c in chunks[:-1]} == {"text_completion"}
    assert [c["text"] for c in found] == ["one", " two", " three"]
    assert [c["finish_reason"] for c in found] == [None, None, "length"]
    assert chunks[-1] == "[DONE]"


@pytest.mark.parametrize("text", ["héllo 🙂 wörld", "日本語のテキスト", "👩‍👩‍👧‍👦 family"])
def test_characters_are_never_split(server: RunningServer, text: str) -> None:
    tokens = server.post("/tokenize", prompt=text).json()["count"]
    found = choices(events(server, "/v1/completions", prompt=text, max_tokens=tokens))
    assert len(found) < tokens  # some characters took several tokens
    assert "".join(c["text"] for c in found) == text
    assert all("\ufffd" not in c["text"] for c in found)


def test_choices_of_one_stream_are_interleaved_and_each_finishes_once(server: RunningServer) -> None:
    found = choices(events(server, "/v1/completions", prompt=["a b c d", "e f g h"], n=2, max_tokens=5))
    for index, expected in enumerate(["a b c", "a b c", "e f g", "e f g"]):
        own = [c for c in found if c["index"] == index]
        assert "".join(c["text"] for c in own).startswith(expected)
        assert [c["finish_reason"] for c in own][-1] == "length"
        assert sum(c["finish_reason"] is not None for c in own) == 1
    order = [c["index"] for c in found]
    assert order != sorted(order)


def test_a_stop_string_never_leaks(server: RunningServer) -> None:
    body = {"prompt": "one two three four ", "max_tokens": 40, "stop": ["three f", "zzz"]}
    found = choices(events(server, "/v1/completions", **body))
    text = "".join(c["text"] for c in found)
    assert text == "one two "
    assert [c["finish_reason"] for c in found if c["finish_reason"]] == ["stop"]
    assert server.post("/v1/completions", **body).json()["choices"][0]["text"] == text
    kept = server.post("/v1/completions", **body, include_stop_str_in_output=True).json()
    assert kept["choices"][0]["text"] == "one two three f"


def test_a_stop_string_ends_its_own_choice_only(server: RunningServer) -> None:
    body = {"prompt": ["one two three four ", "a b c d e f "], "max_tokens": 20, "stop": ["three f"]}
    whole = server.post("/v1/completions", **body).json()["choices"]
    found = choices(events(server, "/v1/completions", **body))
    streamed = ["".join(c["text"] for c in found if c["index"] == index) for index in range(2)]
    assert [c["text"] for c in whole] == streamed
    assert streamed[0] == "one two "
    assert streamed[1].startswith("a b c d e f a b c")
    assert [c["finish_reason"] for c in whole] == ["stop", "length"]
    assert [c["finish_reason"] for c in found if c["finish_reason"]] == ["stop", "length"]
    assert [c["stop_reason"] for c in whole] == ["three f", None]
    assert [c["stop_reason"] for c in found if c["finish_reason"]] == ["three f", None]


def test_the_models_end_token_ends_a_chat(server: RunningServer) -> None:
    choice = server.post("/v1/chat/completions", messages=[USER]).json()["choices"][0]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "user\nhi there", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    assert (
        server.post("/v1/chat/completions", messages=[USER], max_tokens=20, ignore_eos=True).json()["choices"][0][
            "finish_reason"
        ]
        == "length"
    )


def test_a_stop_token_is_named(server: RunningServer) -> None:
    [_, second] = server.post("/tokenize", prompt="one two").json()["tokens"][:2]
    choice = server.post("/v1/completions", prompt="one two", stop_token_ids=[second]).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", second)
    body = {"messages": [USER], "stop": "hi"}
    assert server.post("/v1/chat/completions", **body).json()["choices"][0]["stop_reason"] == "hi"
    assert choices(events(server, "/v1/chat/completions", **body))[-1]["stop_reason"] == "hi"


def test_chat_logprobs(server: RunningServer) -> None:
    body = {"messages": [USER], "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    whole = server.post("/v1/chat/completions", **body).json()["choices"][0]["logprobs"]
    assert [t["token"] for t in whole["content"]] == ["<|im_start|>", "user", "\n"]
    second = whole["content"][1]
    assert second["bytes"] == list(b"user")
    assert second["logprob"] == -0.5
    assert [t["logprob"] for t in second["top_logprobs"]] == [-0.5, -1.5]
    streamed = [c["logprobs"] for c in choices(events(server, "/v1/chat/completions", **body)) if c["logprobs"]]
    assert [token for part in streamed for token in part["content"]] == whole["content"]


def test_completion_logprobs_with_offsets(server: RunningServer) -> None:
    body = {"prompt": "one two three", "max_tokens": 4, "logprobs": 1}
    choice = server.post("/v1/completions", **body).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(logprobs["top_logprobs"]) == 4
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["top_logprobs"][0] == {logprobs["tokens"][0]: -0.5}


def test_echo_scores_the_prompt(server: RunningServer) -> None:
    body = {"prompt": "one two three", "max_tokens": 0, "echo": True, "logprobs": 0}
    reply = server.post("/v1/completions", **body).json()
    choice = reply["choices"][0]
    assert choice["text"] == "one two three"
    assert "".join(choice["logprobs"]["tokens"]) == "one two three"
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert set(choice["logprobs"]["token_logprobs"][1:]) == {-0.5}
    streamed = choices(events(server, "/v1/completions", **body | {"max_tokens": 2}))
    assert "".join(c["text"] for c in streamed).startswith("one two three")


def test_a_request_for_the_prompt_alone_is_charged_no_output(server: RunningServer) -> None:
    body = {"prompt": "one two three", "max_tokens": 0, "echo": True}
    usage = server.post("/v1/completions", **body).json()["usage"]
    assert usage["completion_tokens"] == 0
    assert usage["total_tokens"] == usage["prompt_tokens"] > 0
    streamed = events(server, "/v1/completions", **body, stream_options={"include_usage": True})
    assert [e["usage"] for e in streamed[:-1] if e["usage"]] == [usage]


@pytest.mark.parametrize("skips", [True, False])
def test_echoed_special_tokens_stand_where_the_offsets_say(server: RunningServer, skips: bool) -> None:
    text = "<|endoftext|>one two<|im_end|> three"
    ids = server.post("/tokenize", prompt=text).json()["tokens"]
    body = {"prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 1}
    choice = server.post("/v1/completions", **body, skip_special_tokens=skips).json()["choices"][0]
    assert choice["text"].startswith("one two three" if skips else text)
    offsets = choice["logprobs"]["text_offset"]
    for token, offset in list(zip(choice["logprobs"]["tokens"], offsets, strict=True))[: len(ids)]:
        assert choice["text"][offset:].startswith(token) or (skips and token.startswith("<|"))


def test_token_ids_in_and_out(server: RunningServer) -> None:
    ids = server.post("/tokenize", prompt="one two three").json()["tokens"]
    reply = server.post("/v1/completions", prompt=ids, max_tokens=len(ids), return_token_ids=True).json()
    choice = reply["choices"][0]
    assert choice["text"] == "one two three"
    assert choice["token_ids"] == choice["prompt_token_ids"] == ids
    many = server.post("/v1/completions", prompt=[ids, ids[:2]], max_tokens=2).json()
    assert [c["index"] for c in many["choices"]] == [0, 1]
    assert server.post("/detokenize", tokens=ids).json() == {"prompt": "one two three"}


def test_prompt_logprobs(server: RunningServer) -> None:
    reply = server.post("/v1/completions", prompt="one two three", max_tokens=1, prompt_logprobs=1).json()
    rows = reply["choices"][0]["prompt_logprobs"]
    assert rows[0] is None
    assert all(next(iter(row.values()))["rank"] == 1 for row in rows[1:])


def test_truncate_keeps_the_end_of_a_prompt(server: RunningServer) -> None:
    reply = server.post("/v1/completions", prompt="one two three", truncate_prompt_tokens=2, return_token_ids=True)
    ids = server.post("/tokenize", prompt="one two three").json()["tokens"]
    assert reply.json()["choices"][0]["prompt_token_ids"] == ids[-2:]


def test_cached_tokens_are_reported(server: RunningServer) -> None:
    prompt = "a prompt that is long enough for two blocks of sixteen tokens each, " * 4
    cached = [
        server.post("/v1/completions", prompt=prompt, max_tokens=1, cache_salt=salt).json()["usage"][
            "prompt_tokens_details"
        ]["cached_tokens"]
        for salt in ("a", "a", "b")
    ]
    assert cached[0] == cached[2] == 0
    assert cached[1] >= 32


def test_echo_gives_what_was_read_of_a_prompt_that_was_cut(server: RunningServer) -> None:
    body = {"prompt": "one two three", "echo": True, "logprobs": 0, "truncate_prompt_tokens": 1, "max_tokens": 1}
    choice = server.post("/v1/completions", **body).json()["choices"][0]
    assert choice["text"] == "".join(choice["logprobs"]["tokens"])
    assert "two" not in choice["text"]
