"""What replicas of other makes answer, right or wrong, and what becomes of it at the client."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from byte_replica import ByteReplica, Play, answer, byte_replica
from gateways_for_tests import RunningGateway, asking, running_gateway, text_of, until

CALM = ("--stream-idle-timeout-s=0.5", "--first-byte-timeout-s=0.5", "--request-timeout-s=20")
CHAT = {"model": "public", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 40}
REVISIONS = itertools.count(1)
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), *CALM) as running:
        yield running
        assert "Traceback" not in log(running)


def log(gateway: RunningGateway) -> str:
    return (gateway.database.parent / "gateway.log").read_text()


@contextlib.contextmanager
def serving(gateway: RunningGateway, *plays: Play, **of_replicas: Any) -> Iterator[list[ByteReplica]]:
    """The gateway serves by these replicas, under another name than theirs."""
    revision = f"b{next(REVISIONS)}"
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(byte_replica(play, paths=("/v1/models", "/health"))) for play in plays]
        replicas = [
            {"id": f"{revision}-{number}", "url": one.url, "model": "inner", "engine": "openai", **of_replicas}
            for number, one in enumerate(found)
        ]
        model = {"name": f"public-{revision}", "aliases": ["public"], "replicas": replicas}
        gateway.admin.put("/admin/routes", json={"revision": revision, "models": [model]}).raise_for_status()
        until(lambda: set(gateway.replica_states().values()) == {"ready"})
        yield found


def says(data: bytes) -> Play:
    async def play(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        writer.write(data)

    return play


def chunk(delta: dict[str, Any], finish: Any = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, **more}
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "inner", "choices": [choice]}


def stream(
    values: Sequence[Any], *, done: bool = True, blanks: bool = False, head: bytes = CHUNKED, end: bytes = b"\n"
) -> bytes:
    separators = (", ", ": ") if blanks else (",", ":")
    events = [f"data: {json.dumps(value, separators=separators)}\n\n".encode() for value in values]
    body = b"".join(events + ([b"data: [DONE]\n\n"] if done else [])).replace(b"\n", end)
    return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if head is CHUNKED else head + body


def final_events(data: bytes) -> Play:
    async def play(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        writer.write(data)
        await writer.drain()
        writer.close()

    return play


WORDS = [chunk({"role": "assistant", "content": ""}), *[chunk({"content": f" w{i}"}) for i in range(4)]]
STOP = chunk({}, "stop")
TEXT = " w0 w1 w2 w3"
MESSAGE = {"role": "assistant", "content": "hi", "refusal": None, "reasoning": None}
WHOLE = {
    "id": "x",
    "model": "inner",
    "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


def whole(**more: Any) -> str:
    return json.dumps({**WHOLE, **more})


def error_of(gateway: RunningGateway, *, streamed: bool = False) -> tuple[int, dict[str, Any]]:
    told = gateway.post("/v1/chat/completions", {**CHAT, "stream": streamed})
    error: dict[str, Any] = told.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return told.status_code, error


# ---- right answers


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("head", [CHUNKED, UNTIL_CLOSED], ids=["chunked", "until closed"])
@pytest.mark.parametrize("done", [True, False])
def test_a_stream_whose_choices_have_ended_is_whole(
    gateway: RunningGateway, end: bytes, head: bytes, done: bool
) -> None:
    play = final_events(stream([*WORDS, STOP], done=done, head=head, end=end))
    with serving(gateway, play, play) as replicas:
        for _ in range(8):
            told = gateway.stream("/v1/chat/completions", CHAT)
            assert text_of(told) == TEXT
            assert told[-1] == "[DONE]"
        assert sum(len(one.posts) for one in replicas) == 8, "nothing was run twice"
        assert set(gateway.replica_states().values()) == {"ready"}


def test_a_stream_cut_while_its_finish_reason_is_empty_ends_with_an_error(gateway: RunningGateway) -> None:
    empty = [chunk({"content": f" w{i}"}, "") for i in range(4)]
    for cut in (UNTIL_CLOSED, CHUNKED):
        with serving(gateway, final_events(stream(empty, done=False, head=cut))):
            told = gateway.stream("/v1/chat/completions", CHAT)
            assert text_of(told) == TEXT
            assert told[-1]["error"]["code"] == "upstream_failed"
            assert {one["choices"][0]["finish_reason"] for one in told[:-1]} == {None}, (
                "not '', which may read as an end"
            )
    with serving(gateway, says(stream([*empty, STOP]))):
        assert gateway.stream("/v1/chat/completions", CHAT)[-1] == "[DONE]"


def test_a_choice_that_did_not_end_is_not_taken_for_whole(gateway: RunningGateway) -> None:
    def choice(index: int, finish: str | None = None) -> dict[str, Any]:
        return {**chunk({}), "choices": [{"index": index, "delta": {"content": "a"}, "finish_reason": finish}]}

    half = [choice(0), choice(1), choice(0, "stop")]
    with serving(gateway, says(stream(half))):
        assert "error" in gateway.stream("/v1/chat/completions", {**CHAT, "n": 2})[-1]
    with serving(gateway, says(stream([*half, choice(1, "stop")]))):
        assert gateway.stream("/v1/chat/completions", {**CHAT, "n": 2})[-1] == "[DONE]"


@pytest.mark.parametrize("blanks", [False, True])
@pytest.mark.parametrize("engine", ["vllm", "openai"])
def test_the_name_behind_and_ids_that_nobody_asked_for_stay_inside(
    gateway: RunningGateway, blanks: bool, engine: str
) -> None:
    marked = [chunk({"content": f" w{i}"}, token_ids=[i, 2**32 - 1], prompt_token_ids=[7]) for i in range(4)]
    marked[0] = {"prompt_token_ids": [1, 2], "usage": None, **marked[0]}
    last = {**STOP, "choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}}
    with serving(gateway, says(stream([WORDS[0], *marked, STOP, last], blanks=blanks))):
        with gateway.http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as told:
            raw = told.read().decode()
        assert text_of([json.loads(line[6:]) for line in raw.split("\n\n")[:-2]]) == TEXT
        for secret in ("inner", "token_ids", "usage"):
            assert secret not in raw
    with serving(gateway, says(answer(json.dumps(WHOLE, indent=2)))):
        raw = gateway.post("/v1/chat/completions", CHAT).text
        assert "inner" not in raw
        assert json.loads(raw)["choices"] == WHOLE["choices"]


@pytest.mark.parametrize(
    "more",
    [
        {"tool_calls": []},
        {"tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"content": [{"type": "text", "text": "hi"}]},
        {"content": None, "reasoning_content": "hm"},
    ],
    ids=["no calls", "a call", "parts", "reasoning"],
)
def test_messages_of_other_servers_are_right_answers(gateway: RunningGateway, more: dict[str, Any]) -> None:
    message = {**MESSAGE, **more}
    body = whole(choices=[{"index": 0, "message": message, "finish_reason": "stop"}], error=None)
    with serving(gateway, says(answer(body))) as (replica,):
        assert gateway.post("/v1/chat/completions", CHAT).json()["choices"][0]["message"] == message
        assert len(replica.posts) == 1
    delta = {name: value for name, value in message.items() if name != "role"}
    with serving(gateway, says(stream([WORDS[0], chunk(delta), STOP]))) as (replica,):
        told = gateway.stream("/v1/chat/completions", CHAT)
        assert told[1]["choices"][0]["delta"] == delta
        assert len(replica.posts) == 1


def test_an_error_in_a_stream_is_the_requests_own_or_the_replicas(gateway: RunningGateway) -> None:
    own = {"error": {"message": "too odd", "type": "BadRequestError", "param": {"a": 1}, "code": 400}}
    with serving(gateway, says(stream([own]))) as (replica,):
        assert error_of(gateway, streamed=True) == (400, {**error_of(gateway, streamed=True)[1], "message": "too odd"})
        assert len(replica.posts) == 2
    for failed in ({"error": {"message": "out of memory", "code": 500}}, {"error": "boom"}):
        with serving(gateway, says(stream([failed])), says(stream([*WORDS, STOP]))):
            for _ in range(3):
                assert text_of(gateway.stream("/v1/chat/completions", CHAT)) == TEXT


@pytest.mark.parametrize(
    "error",
    [
        {"object": "error", "message": "boom", "usage": {"prompt_tokens": 1, "completion_tokens": 1}},
        {"object": "error", "message": ""},
        {"errors": [{"title": "boom"}]},
    ],
)
def test_an_error_event_in_any_form_ends_the_replica_s_part(gateway: RunningGateway, error: dict[str, Any]) -> None:
    ends_in_spite_of_it = says(stream([error, chunk({"content": "wrong"}), STOP]))
    with serving(gateway, ends_in_spite_of_it, says(stream([*WORDS, STOP]))):
        for _ in range(3):
            assert text_of(gateway.stream("/v1/chat/completions", CHAT)) == TEXT


def test_what_comes_of_a_choice_after_its_end_is_not_passed_on(gateway: RunningGateway) -> None:
    with serving(gateway, says(stream([*WORDS, STOP, *WORDS]))):
        assert text_of(gateway.stream("/v1/chat/completions", CHAT)) == TEXT


# ---- tokens of a text


def test_replicas_count_tokens_in_turns(gateway: RunningGateway) -> None:
    play = says(answer('{"count": 1, "tokens": [5]}'))
    with serving(gateway, play, play, play) as replicas:
        for _ in range(6):
            assert gateway.post("/tokenize", {"model": "public", "prompt": "a"}).status_code == 200
        assert [len(one.posts) for one in replicas] == [2, 2, 2]


@pytest.mark.parametrize("path", ["/tokenize", "/v1/messages/count_tokens", "/v1/responses/input_tokens"])
def test_what_a_client_that_left_asked_for_is_not_counted_any_more(gateway: RunningGateway, path: str) -> None:
    ended = threading.Event()

    async def play(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        try:
            while True:  # until the gateway closes the connection
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                await writer.drain()
                await asyncio.sleep(0.05)
        finally:
            ended.set()

    with serving(gateway, play) as (replica,):
        with asking(gateway, path, {"model": "public", "prompt": "a"}):
            until(lambda: replica.posts)
        assert ended.wait(3), "the replica is asked on, for up to 30 s"


# ---- refusals


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured_for_each_replica_and_passed_on(
    gateway: RunningGateway, status: int, form: str
) -> None:
    value = "30" if form == "seconds" else email.utils.formatdate(time.time() + 31, usegmt=True)
    play = says(answer('{"error":{"message":"slow down"}}', status=status, headers=f"Retry-After: {value}\r\n"))
    with serving(gateway, play, play) as replicas:
        for number in (1, 2):  # the second waits for a moment, and is what each of them is tried with
            refused = gateway.post("/v1/chat/completions", CHAT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "replicas_busy")
            assert refused.json()["error"]["message"].endswith(("replicas).", "replica).", " s.")), "a whole sentence"
            assert 27 <= int(refused.headers["retry-after"]) <= 31
            assert [len(one.posts) for one in replicas] == [number, number]


def test_a_long_retry_after_is_for_the_client_that_it_was_said_to(gateway: RunningGateway) -> None:
    """As hosted servers say of one request that is too large."""

    async def play(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        is_large = "large" in json.dumps(body)
        writer.write(answer("{}", status=429, headers="Retry-After: 7200\r\n") if is_large else answer(whole()))

    with serving(gateway, play, play) as replicas:
        refused = gateway.post("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "large"}]})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "7200")
        assert [len(one.posts) for one in replicas] == [1, 1]
        assert [gateway.post("/v1/chat/completions", CHAT).status_code for _ in range(4)] == [200] * 4


def test_a_replica_that_has_room_gets_what_another_refuses(gateway: RunningGateway) -> None:
    refuses = says(answer("{}", status=429, headers="Retry-After: 60\r\n"))
    with serving(gateway, refuses, says(answer(whole()))) as (first, second):
        assert [gateway.post("/v1/chat/completions", CHAT).status_code for _ in range(6)] == [200] * 6
        assert len(first.posts) <= 1
        assert len(second.posts) == 6


def test_a_short_refusal_is_waited_out(gateway: RunningGateway) -> None:
    numbers = itertools.count()

    async def play(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        writer.write(answer(whole()) if next(numbers) else answer("{}", status=429, headers="Retry-After: 1\r\n"))

    with serving(gateway, play) as (replica,):
        start_s = time.monotonic()
        assert gateway.post("/v1/chat/completions", CHAT).status_code == 200
        assert time.monotonic() - start_s >= 0.9
        assert len(replica.posts) == 2


@pytest.mark.parametrize("status", [401, 402, 403, 407])
def test_a_key_that_a_replica_refuses_is_not_the_clients(gateway: RunningGateway, status: int) -> None:
    refuses = says(answer('{"error":{"message":"bad key sk-secret"}}', status=status))
    with serving(gateway, refuses, api_key="sk-secret") as (replica,):
        found, error = error_of(gateway)
        assert (found, error["code"]) == (502, "upstream_failed")
        assert "sk-secret" not in error["message"]
        assert len(replica.posts) == 1, "it would say so again"
        assert "rejects the gateway's key" in log(gateway)
        assert "sk-secret" not in log(gateway)
    with serving(gateway, refuses, says(answer(whole()))):
        assert [gateway.post("/v1/chat/completions", CHAT).status_code for _ in range(8)] == [200] * 8
        assert sorted(gateway.replica_states().values()) == ["open", "ready"]


FORBIDDEN = [
    (403, {"error": {"code": 403, "message": "Your input was flagged", "metadata": {"reasons": ["violence"]}}}),
    (403, {"error": {"code": "content_policy_violation", "message": "The prompt was rejected.", "type": "x"}}),
    (403, {"error": {"code": "model_not_allowed", "message": "This project may not use inner.", "type": "x"}}),
    (
        402,
        {"error": {"code": 402, "message": "You requested 40 tokens, but can only afford 7. Create a key with more."}},
    ),
    (403, {"detail": "flagged"}),
    (403, {"error": "Forbidden"}),
    (403, {}),
]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("status", "body"), FORBIDDEN)
def test_what_is_forbidden_to_one_request_is_said_to_its_client_and_counts_against_no_replica(
    gateway: RunningGateway, status: int, body: dict[str, Any], streamed: bool
) -> None:
    async def play(writer: asyncio.StreamWriter, asked: dict[str, Any]) -> None:
        is_flagged = "flagged" in str(asked["messages"])
        writer.write(answer(json.dumps(body), status=status) if is_flagged else answer(whole()))

    flagged = {**CHAT, "messages": [{"role": "user", "content": "flagged"}], "stream": streamed}
    with serving(gateway, play, play, play, play) as replicas:
        for _ in range(8):
            assert gateway.post("/v1/chat/completions", CHAT).status_code == 200
        num_before = sum(len(replica.posts) for replica in replicas)
        for _ in range(8):
            told = gateway.post("/v1/chat/completions", flagged)
            assert told.status_code == status
            assert "key (HTTP" not in told.text
            assert "inner" not in told.text
        assert sum(len(replica.posts) for replica in replicas) - num_before == 16, "two tries each"
        assert set(gateway.replica_states().values()) == {"ready"}


def test_what_one_provider_forbids_another_may_answer(gateway: RunningGateway) -> None:
    forbids = says(answer(json.dumps({"error": {"code": 402, "message": "Insufficient balance"}}), status=402))
    with serving(gateway, forbids, says(answer(whole()))):
        assert [gateway.post("/v1/chat/completions", CHAT).status_code for _ in range(6)] == [200] * 6


@pytest.mark.parametrize(("status", "expected"), [(403, (403, "invalid_request")), (429, (503, "replicas_busy"))])
def test_an_error_in_a_stream_means_what_its_status_means(
    gateway: RunningGateway, status: int, expected: tuple[int, str]
) -> None:
    """As hosted APIs report moderation and limits once they have sent the status 200."""
    event = {"error": {"code": status, "message": "Your input was flagged, or there were too many"}}
    play = final_events(stream([event]))
    with serving(gateway, play, play):
        found, error = error_of(gateway, streamed=True)
        assert (found, error["code"]) == expected
        assert set(gateway.replica_states().values()) == {"ready"}


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"code": "invalid_api_key", "message": "No."}},
        {"error": {"type": "authentication_error", "message": "No."}},
        {"detail": "Not authenticated"},
        {"error": "Forbidden"},
        {},
    ],
)
def test_a_403_that_names_the_key_or_says_nothing_is_about_the_key(
    gateway: RunningGateway, body: dict[str, Any]
) -> None:
    with serving(gateway, says(answer(json.dumps(body), status=403))):
        found, error = error_of(gateway)
        assert (found, error["code"]) == (502, "upstream_failed")
        assert "rejects the gateway's key" in error["message"]


@pytest.mark.parametrize("status", [404, 405, 501])
def test_what_a_replica_lacks_is_asked_of_another_and_ejects_none(gateway: RunningGateway, status: int) -> None:
    lacks = says(answer("<html>none</html>", status=status, kind="text/html"))
    with serving(gateway, lacks, lacks):
        for _ in range(8):
            found, error = error_of(gateway)
            assert (found, error["code"]) == (502, "upstream_failed")
        assert set(gateway.replica_states().values()) == {"ready"}
    with serving(gateway, lacks, says(answer(whole()))):
        assert [gateway.post("/v1/chat/completions", CHAT).status_code for _ in range(6)] == [200] * 6


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (400, '{"error":{"message":"model inner says no","code":400}}', "application/json", "model public-"),
        (400, '{"object":"error","message":"flat","type":"x","code":400}', "application/json", "flat"),
        (422, '{"detail":[{"loc":["body","n"],"msg":"bad"}]}', "application/json", "bad"),
        (400, '{"error":"just a text"}', "application/json", "just a text"),
        (413, "<html><h1>413</h1></html>", "text/html", "413 Request Entity Too Large"),
        (400, "bad request", "text/plain", "400 Bad Request"),
        (499, '{"error":{"message":"a status that no list has"}}', "application/json", "a status that no list has"),
    ],
)
def test_what_is_wrong_with_a_request_is_told_in_openais_shape(
    gateway: RunningGateway, status: int, body: str, kind: str, message: str, streamed: bool
) -> None:
    with serving(gateway, says(answer(body, status=status, kind=kind))) as (replica,):
        found, error = error_of(gateway, streamed=streamed)
        assert found == status
        assert message in error["message"]
        assert "inner" not in error["message"]
        assert len(replica.posts) == 1
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(model="public", messages=[{"role": "user", "content": "a"}])
        assert caught.value.status_code == status


# ---- lies


LIES = {
    "a page": answer("<html>login</html>", kind="text/html"),
    "null": answer("null"),
    "no choices": answer('{"choices":[]}'),
    "usage of 2^63": answer(whole(usage={"prompt_tokens": 2**63, "completion_tokens": 1})),
    "usage below 0": answer(whole(usage={"prompt_tokens": -5, "completion_tokens": 1})),
    "usage in words": answer(whole(usage={"prompt_tokens": "many"})),
    "deep": answer(whole()[:-1] + ',"x":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "no UTF-8": answer(whole().encode().replace(b'"x"', b'"\xb3"')),
    "many choices": answer(json.dumps({"choices": [{}] * 400_000})),
    "a redirect": answer("", status=302, headers="Location: http://127.0.0.1:1/\r\n"),
    "no content": b"HTTP/1.1 204 X\r\n\r\n",
    "zipped": answer(b"\x1f\x8b\x08\x00", headers="Content-Encoding: gzip\r\n"),
}
BAD_STREAMS = {
    "ids of 2^64": stream([WORDS[0], chunk({"content": "a"}, token_ids=[2**64])]),
    "negative ids": stream([chunk({"content": "a"}, token_ids=[-1])]),
    "usage of 2^63": stream([{**STOP, "usage": {"prompt_tokens": 2**63}}]),
    "no UTF-8": stream(WORDS).replace(b'"x"', b'"\xb3"'),
    "a choice of none": stream([{**STOP, "choices": [{"index": 9, "delta": {"content": "a"}}]}]),
    "nothing": CHUNKED + b"0\r\n\r\n",
    "a page": answer("<html>login</html>", kind="text/html"),
    "a whole answer": answer(whole()),
    "comments without end": CHUNKED + b"%x\r\n%b\r\n" % (400_000, b": x\n\n" * 80_000),
    "empty lines without end": CHUNKED + b"%x\r\n%b\r\n" % (400_000, b"\n\n" * 200_000),
    "chunks of a byte": CHUNKED + b"1\r\n:\r\n1\r\n\n\r\n1\r\n\n\r\n" * 10_000,
    "an event without end": CHUNKED + b"%x\r\n%b\r\n" % (17 << 20, b"data: " + b"x" * ((17 << 20) - 6)),
    "trailers without end": CHUNKED + b"3\r\n: a\r\n0\r\n" + b"a: b\r\n" * 60_000,
    "a head without end": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 60_000,
    "continue without end": b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_run_again_elsewhere_and_its_replica_ejected(gateway: RunningGateway, lie: str) -> None:
    with serving(gateway, says(LIES[lie]), says(answer(whole()))):
        found = [gateway.post("/v1/chat/completions", CHAT).status_code for _ in range(8)]
        assert found == [200] * 8
        assert sorted(gateway.replica_states().values()) == ["open", "ready"]
    with serving(gateway, says(LIES[lie])) as (replica,):
        assert error_of(gateway)[0] == 502
        assert len(replica.posts) <= 3


@pytest.mark.parametrize("lie", BAD_STREAMS)
def test_a_stream_that_lies_is_run_again_elsewhere(gateway: RunningGateway, lie: str) -> None:
    with serving(gateway, final_events(BAD_STREAMS[lie]), says(stream([*WORDS, STOP]))):
        for _ in range(6):
            told = gateway.stream("/v1/chat/completions", CHAT)
            assert told[-1] == "[DONE]" or told[-1]["error"]["code"] == "upstream_failed"
        assert sorted(gateway.replica_states().values()) == ["open", "ready"]


def test_comments_are_no_progress(gateway: RunningGateway) -> None:
    async def play(writer: asyncio.StreamWriter, _: dict[str, Any]) -> None:
        writer.write(CHUNKED)
        while True:
            writer.write(b"e\r\n: keep-alive\n\n\r\n")
            await writer.drain()
            await asyncio.sleep(0.05)

    with serving(gateway, play) as (replica,):
        start_s = time.monotonic()
        assert error_of(gateway, streamed=True)[0] == 504
        assert time.monotonic() - start_s < 25
        assert len(replica.posts) <= 3


def test_one_token_and_then_silence_is_not_retried_for_ever(gateway: RunningGateway) -> None:
    async def play(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        first = len(body.get("resume_token_ids", ()))
        data = f"data: {json.dumps(chunk({'content': ' a'}, token_ids=[first]))}\n\n".encode()
        writer.write(CHUNKED + b"%x\r\n%b\r\n" % (len(data), data))
        await asyncio.sleep(30)

    with serving(gateway, play, play, engine="vllm") as replicas:
        told = gateway.stream("/v1/chat/completions", CHAT)
        assert told[-1]["error"]["code"] == "upstream_failed"
        assert sum(len(one.posts) for one in replicas) <= 3


def test_a_stream_ends_soon_after_the_limit_that_its_engine_does_not_keep(gateway: RunningGateway) -> None:
    endless = stream([chunk({"content": " a" * 100})] * 5000, done=False)
    with serving(gateway, says(endless)) as (replica,):
        told = gateway.stream("/v1/chat/completions", CHAT)
        assert told[-1] == "[DONE]"
        assert told[-2]["choices"][0]["finish_reason"] == "length"
        assert len(told) < 200
        assert set(gateway.replica_states().values()) == {"ready"}
        assert len(replica.posts) == 1


def test_an_answer_that_nobody_asked_for_reaches_nobody(gateway: RunningGateway) -> None:
    poison = answer(whole(id="poison"))
    with serving(gateway, says(answer(whole()) + poison)):
        for _ in range(6):
            assert gateway.post("/v1/chat/completions", CHAT).json()["id"] == "x"


# ---- discovery


ENGINES: list[tuple[str, tuple[str, ...], str]] = [  # who owns the model, which health page there is, the engine
    ("tensorrt_llm", ("/health",), "trtllm"),
    ("sglang", ("/health",), "sglang"),
    ("vllm", ("/health",), "vllm"),
    ("vllm", (), "openai"),
    ("llamacpp", ("/health",), "llamacpp"),
    ("powerband", ("/readyz",), "powerband"),
    ("powerband", (), "openai"),
    ("library", (), "openai"),
    ("organization_owner", (), "openai"),
    ("nvidia", ("/health",), "openai"),
]


def test_what_a_replica_runs_is_found_out_and_said(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        replicas = [
            stack.enter_context(byte_replica(says(answer(whole())), owner=owner, paths=("/v1/models", *paths)))
            for owner, paths, _ in ENGINES
        ]
        gateway = stack.enter_context(running_gateway(tmp_path, *(f"--replica={replica.url}" for replica in replicas)))
        until(lambda: list(gateway.replica_states().values()) == ["ready"] * len(ENGINES))
        (model,) = gateway.admin.get("/admin/routes").json()["routes"]["models"]
        found = {replica["url"]: replica["engine"] for replica in model["replicas"]}
        for replica, (owner, _, engine) in zip(replicas, ENGINES, strict=True):
            assert found[replica.url] == engine
            assert f"{replica.url.removeprefix('http://')}: engine {engine} (its models are owned by {owner!r}" in log(
                gateway
            )
        while not all(replica.posts for replica in replicas):
            assert gateway.post("/v1/chat/completions", {**CHAT, "model": "inner"}).status_code == 200


def test_what_a_replica_runs_can_be_given(tmp_path: Path) -> None:
    with (
        byte_replica(owner="none", paths=("/v1/models", "/health")) as replica,
        running_gateway(tmp_path, f"--replica={replica.url}", "--replica-engine=sglang") as gateway,
    ):
        until(lambda: set(gateway.replica_states().values()) == {"ready"})
        assert "engine sglang (as --replica-engine says)" in log(gateway)
        assert "/health" in replica.gets


def test_a_probe_that_a_replica_lacks_is_said(tmp_path: Path) -> None:
    with byte_replica() as replica:
        routes = tmp_path / "routes.yaml"
        routes.write_text(
            f"models:\n- name: m\n  replicas:\n  - {{id: r, url: '{replica.url}', model: inner, engine: powerband}}\n"
        )
        with running_gateway(tmp_path, f"--routes={routes}") as gateway:
            until(lambda: "GET /readyz answers 404; is its engine 'powerband'?" in log(gateway))
