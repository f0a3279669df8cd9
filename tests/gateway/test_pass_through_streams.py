"""Streams of OpenAI's Responses API and Anthropic's Messages API through a gateway, whole and broken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import vllm_replica
from byte_replica import answer
from gateways_for_tests import RunningGateway, running_gateway, until
from pass_through_gateway import client_of, last_record, new_key, serving
from vllm_replica import CHUNKED, TEXT, as_frames

Event = dict[str, Any]
BODIES: dict[str, Event] = {
    "/v1/responses": {"input": "How is the weather?", "max_output_tokens": 20},
    "/v1/messages": {"messages": [{"role": "user", "content": "How is the weather?"}], "max_tokens": 20},
}
FIRST = {"/v1/responses": 4, "/v1/messages": 2}  # events before the first output


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), "--stream-idle-timeout-s=1") as running:
        yield running
        assert "Traceback" not in (running.database.parent / "gateway.log").read_text()


@pytest.fixture(params=BODIES)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stream(gateway: RunningGateway, path: str, name: str = "public", **more: Any) -> list[tuple[str, Event]]:
    """The type and the data of each event."""
    body = {"model": name, **BODIES[path], "stream": True, **more}
    with gateway.http.stream("POST", path, json=body) as found:
        text = found.read().decode()
        assert found.status_code == 200, text
        assert found.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in text.split("\n\n")[:-1]]
    assert all(len(lines) == 2 for lines in blocks), "a type and data, as both clients expect"
    return [(lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: "))) for lines in blocks]


def sends(count: int, *, then: bytes = b"", more: tuple[Event, ...] = ()) -> Any:
    """The first events, and others; then these bytes, after which the connection closes unless they end the body."""

    def respond(path: str, body: Event) -> bytes:
        events = vllm_replica.STREAMS[path](body)[:count]
        return b"".join((CHUNKED, *as_frames([*events, *more]))) + then

    return respond


END = b"0\r\n\r\n"


# ---- streams that are complete


def test_events_come_as_the_replica_sent_them_under_the_served_name(gateway: RunningGateway, path: str) -> None:
    with serving(gateway) as (replica,):
        events = [data for _, data in stream(gateway, path)]
        assert events == vllm_replica.STREAMS[path]({**replica.posts[-1], "model": "public"})
        record = last_record(gateway)
        counted = record["record"]
        assert (counted["prompt_tokens"], counted["output_tokens"], record["is_estimate"]) == (7, 4, False)
        assert (counted["outcome"], record["finish_reason"]) == (
            "ok",
            {"/v1/responses": "completed"}.get(path, "end_turn"),
        )
        assert len(counted["chunk_times_s"]) == 4
        assert record["cost_usd"] == 15


def test_a_stream_of_the_official_client(gateway: RunningGateway) -> None:
    with serving(gateway):
        with client_of(gateway).responses.stream(model="public", input="How is the weather?") as found:
            assert "".join(one.delta for one in found if one.type == "response.output_text.delta") == TEXT
            final = found.get_final_response()
        assert (final.output_text, final.model) == (TEXT, "public")
        assert final.usage is not None
        assert final.usage.total_tokens == 11


def test_what_follows_the_last_event_is_not_passed_on(gateway: RunningGateway, path: str) -> None:
    extra = ({"type": "ping"}, {"type": "response.created", "response": {"model": "inner"}})
    done = b"e\r\ndata: [DONE]\n\n\r\n"
    for then in (END, done + END, done):
        with serving(gateway, sends(99, then=then, more=extra)):
            events = stream(gateway, path)
            assert events[-1][0] in ("response.completed", "message_stop")
            assert last_record(gateway)["record"]["outcome"] == "ok"


# ---- streams that break off


def test_another_replica_takes_over_until_the_first_output(gateway: RunningGateway, path: str) -> None:
    for count in range(FIRST[path] + 1):
        with serving(gateway, sends(count), vllm_replica.respond, name=f"{path}-{count}"):
            for _ in range(4):
                events = [data for _, data in stream(gateway, path, f"{path}-{count}")]
                assert len(events) == len(vllm_replica.STREAMS[path]({"model": "inner"})), "one beginning, one end"
            assert sorted(gateway.replica_states().values()) == ["open", "ready"]


def test_a_stream_that_breaks_after_output_ends_with_an_error(gateway: RunningGateway, path: str) -> None:
    for number, then in enumerate((b"", END)):  # the connection; or a clean end of the body, without a last event
        name = f"broken-{path}-{number}"
        with serving(gateway, sends(FIRST[path] + 2, then=then), name=name):
            events = stream(gateway, path, name)
            assert len(events) == FIRST[path] + 3
            kind, error = events[-1]
            assert (kind, error["type"], error["error"]["code"]) == ("error", "error", "upstream_failed")
            if path == "/v1/responses":
                assert (error["code"], error["sequence_number"]) == ("upstream_failed", FIRST[path] + 2)
            record = last_record(gateway)
            assert (record["record"]["outcome"], record["error"]) == ("error", "upstream_failed")
            assert record["record"]["output_tokens"] > 0, "what the client received is charged"


def test_the_official_client_raises_when_a_stream_breaks(gateway: RunningGateway) -> None:
    with serving(gateway, sends(6), name="raises"):
        found = client_of(gateway).responses.create(model="raises", input="hi", stream=True)
        with pytest.raises(openai.APIError, match="no other replica can continue"):
            list(found)


def test_a_response_that_failed_is_asked_of_another_replica(gateway: RunningGateway) -> None:
    failed = {"status": "failed", "error": {"code": "server_error", "message": "boom"}}

    def fails(path: str, body: Event) -> bytes:
        response = {**vllm_replica.response(body, status="in_progress"), **failed}
        if not body.get("stream"):
            return answer(json.dumps(response))
        return sends(2, more=({"type": "response.failed", "response": response},), then=END)(path, body)  # type: ignore[no-any-return]

    for is_stream in (False, True):
        with serving(gateway, fails, vllm_replica.respond, name=f"failed-{is_stream}"):
            body = {"model": f"failed-{is_stream}", **BODIES["/v1/responses"], "stream": is_stream}
            found = [gateway.post("/v1/responses", body) for _ in range(6)]
            assert all(one.status_code == 200 and "boom" not in one.text for one in found)


def test_an_error_event_about_the_request_is_a_400_before_the_first_output(gateway: RunningGateway) -> None:
    errors: dict[str, Event] = {
        "/v1/messages": {"type": "error", "error": {"type": "invalid_request_error", "message": "inner: too odd"}},
        "/v1/responses": {"type": "error", "error": {"type": "BadRequestError", "message": "inner: too odd"}},
    }
    for path, error in errors.items():
        with serving(gateway, sends(1, more=(error,), then=END)) as (replica,):
            found = gateway.post(path, {"model": "public", **BODIES[path], "stream": True})
            assert (found.status_code, len(replica.posts)) == (400, 1)
            assert "public: too odd" in found.json()["error"]["message"]


@pytest.mark.parametrize(
    "lie",
    [
        answer("<html>login</html>", kind="text/html"),
        answer("{}"),
        CHUNKED + END,
        CHUNKED + b"9\r\ndata: 7\n\n\r\n" + END,
        CHUNKED + b"".join(as_frames([{"type": "a b\n"}])) + END,
        CHUNKED + b"".join(as_frames([{"type": "message_start", "message": {"usage": {"input_tokens": -1}}}])) + END,
        answer('{"error": "boom"}', status=500),
    ],
)
def test_a_lie_is_asked_of_another_replica(gateway: RunningGateway, path: str, lie: bytes) -> None:
    name = f"lie-{path}-{hash(lie)}"
    with serving(gateway, lambda _path, _body: lie, vllm_replica.respond, name=name):
        for _ in range(6):
            assert stream(gateway, path, name)[-1][0] in ("response.completed", "message_stop")
        assert sorted(gateway.replica_states().values()) == ["open", "ready"]


def test_a_replica_that_sends_more_than_was_asked_for_is_stopped(gateway: RunningGateway, path: str) -> None:
    def floods(path: str, body: Event) -> bytes:
        events = vllm_replica.STREAMS[path](body)
        output = json.loads(json.dumps(events[FIRST[path]]).replace(vllm_replica.WORDS[0], "x" * 300))
        return b"".join((CHUNKED, *as_frames([*events[: FIRST[path]], *([output] * 3000)]), END))

    with serving(gateway, floods, name=f"flood-{path}"):
        events = stream(gateway, path, f"flood-{path}")
        assert events[-1][0] == "error"
        assert len(events) < 400
        assert last_record(gateway)["record"]["output_tokens"] <= 20, "no more than the request's limit is charged"


def test_a_client_that_leaves_is_charged_for_what_it_received(gateway: RunningGateway, path: str) -> None:
    key, secret = new_key(gateway)

    def hangs(path: str, body: Event) -> bytes:
        return vllm_replica.Held(sends(FIRST[path] + 2)(path, body))

    with serving(gateway, hangs, name=f"left-{path}"):
        before = gateway.records()[-1]["sequence"]
        body = {"model": f"left-{path}", **BODIES[path], "stream": True}
        headers = {"Authorization": f"Bearer {secret}"}
        with gateway.http.stream("POST", path, json=body, headers=headers) as found:
            assert next(line for line in found.iter_lines() if "sunny" in line or "is" in line)
        until(lambda: gateway.records(before))
        record = gateway.records(before)[-1]
        assert (record["request"]["tenant"], record["status"], record["record"]["outcome"]) == (key, 499, "aborted")
        assert record["record"]["output_tokens"] == 2
        assert record["is_estimate"]


@pytest.mark.parametrize(
    ("at_start", "at_end"),
    [
        ({"input_tokens": 5, "output_tokens": 1}, {"output_tokens": 9}),  # Anthropic's own
        ({"input_tokens": 5, "output_tokens": 0}, {"input_tokens": 0, "output_tokens": 9}),
        ({"input_tokens": 2, "cache_read_input_tokens": 3, "output_tokens": 1}, {"output_tokens": 9}),
        ({"input_tokens": 0, "output_tokens": 0}, {"input_tokens": 5, "output_tokens": 9}),
    ],
)
def test_usage_is_what_the_start_and_the_end_of_a_message_report_together(
    gateway: RunningGateway, at_start: Event, at_end: Event
) -> None:
    def respond(path: str, body: Event) -> bytes:
        events = vllm_replica.STREAMS[path](body)
        events[0]["message"]["usage"], events[-2]["usage"] = at_start, at_end
        return b"".join((CHUNKED, *as_frames(events), END))

    with serving(gateway, respond):
        stream(gateway, "/v1/messages")
        record = last_record(gateway)["record"]
        assert (record["prompt_tokens"], record["output_tokens"]) == (5, 9)
        assert record["cached_tokens"] == at_start.get("cache_read_input_tokens", 0)
