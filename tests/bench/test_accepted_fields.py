"""Strict servers: the fields that they reject are found and left out, and what is lost is said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from powerband.bench.client.accepted_fields import find_accepted_fields, rejected_text
from powerband.bench.client.messages import Endpoint, RequestMessage, SegmentMessage, ServerAddress
from powerband.bench.client.prompts import ConversationPrompts, PromptMaker

Judge = Callable[[dict[str, Any]], dict[str, Any] | None]


def found(judge: Judge, endpoint: Endpoint = "chat", **target: Any) -> tuple[ServerAddress, int]:
    """The target for a server that answers 400 with what `judge` says of a body, and how many requests it took."""
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        problem = judge(json.loads(await reader.readexactly(length)))
        body = json.dumps(problem or {}).encode()
        status = "400 Bad Request" if problem else "200 OK"
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    async def run() -> ServerAddress:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            return await find_accepted_fields(ServerAddress(base=base, endpoint=endpoint, model="m", **target))
        finally:
            server.close()

    return asyncio.run(run()), asked


def rejecting(*names: str, says: Callable[[str], dict[str, Any]]) -> Judge:
    def judge(body: dict[str, Any]) -> dict[str, Any] | None:
        held = {*body, *body.get("stream_options", ())}
        return next((says(name) for name in names if name in held), None)

    return judge


def openai_error(name: str) -> dict[str, Any]:
    return {"error": {"message": f"Unrecognized request argument supplied: {name}", "param": None, "code": None}}


def named_error(name: str) -> dict[str, Any]:
    path = f"stream_options.{name}" if name == "continuous_usage_stats" else name
    return {"error": {"message": "Unknown parameter.", "param": path, "code": "unknown_parameter"}}


def fastapi_error(name: str) -> dict[str, Any]:
    return {"detail": [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}]}


def wordless_error(_name: str) -> dict[str, Any]:
    return {"error": "bad request"}


def body_for(target: ServerAddress) -> dict[str, Any]:
    planned = RequestMessage(0, (SegmentMessage("a", 4),), 16, 0, 0.0)
    return dict(json.loads(ConversationPrompts(target, PromptMaker()).body(planned)))


def test_a_server_that_accepts_all_is_asked_once() -> None:
    target, asked = found(lambda _body: None)
    assert (target.rejected_fields, asked, rejected_text(target)) == ((), 1, "")


@pytest.mark.parametrize("says", [openai_error, named_error, fastapi_error])
def test_fields_that_errors_name_are_left_out(says: Callable[[str], dict[str, Any]]) -> None:
    target, asked = found(rejecting("ignore_eos", "continuous_usage_stats", "max_tokens", says=says))
    assert sorted(target.rejected_fields) == ["continuous_usage_stats", "ignore_eos", "max_tokens"]
    assert asked == 4
    body = body_for(target)
    assert (body["stream_options"], body["max_completion_tokens"]) == ({"include_usage": True}, 16)
    assert not body.keys() & {"ignore_eos", "max_tokens"}
    assert "may be shorter than asked for" in rejected_text(target)


def test_without_a_name_the_first_that_no_server_knows_is_left_out() -> None:
    target, _ = found(rejecting("continuous_usage_stats", says=wordless_error))
    assert target.rejected_fields == ("continuous_usage_stats",)


def test_an_error_about_something_else_changes_nothing() -> None:
    target, asked = found(lambda _body: {"error": {"message": "The prompt is too short.", "param": "messages"}})
    assert (target.rejected_fields, asked) == ((), 2)


def test_what_the_user_sends_himself_is_kept() -> None:
    target, _ = found(rejecting("temperature", says=openai_error), extra={"temperature": 0.5})
    assert target.rejected_fields == ()
    assert body_for(target)["temperature"] == 0.5


def test_completions_have_no_other_name_for_their_limit() -> None:
    target, _ = found(rejecting("max_tokens", says=openai_error), endpoint="completions")
    assert target.rejected_fields == ()
