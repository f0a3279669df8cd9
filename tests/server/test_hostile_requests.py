"""Bad input: always a 4xx in OpenAI's shape at once, naming field, value and limit; and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

import pytest
from servers_for_tests import RunningServer

from powerband.core.params import MAX_LOGIT_BIAS

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LIMIT_S = 1.0  # 0.1 on a machine that does nothing else
USER = [{"role": "user", "content": "hi"}]


def refuse(server: RunningServer, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    """The error object of a refusal."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    best_s = float("inf")
    for _ in range(20):  # on a crowded machine a try may wait for the processor
        start_s = time.monotonic()
        response = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
        best_s = min(best_s, time.monotonic() - start_s)
        if best_s < LIMIT_S:
            break
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(response.content) < 2000  # what was sent is not sent back
    assert best_s < LIMIT_S
    return error


FIELDS: list[tuple[str, dict[str, Any], str, str]] = [
    (COMPLETIONS, {"prompt": "a", "temprature": 1}, "temprature", "Did you mean 'temperature'?"),
    (COMPLETIONS, {"prompt": "a", "stream_options": {"use": True}}, "stream_options.use", "listed in docs/api.md"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, "n", "'n' is 0: it must be a whole number from 1 to 128."),
    (COMPLETIONS, {"prompt": "a", "n": 129}, "n", "'n' is 129: it must be a whole number from 1 to 128."),
    (COMPLETIONS, {"prompt": "a", "n": 10**30}, "n", "from 1 to 128"),
    (COMPLETIONS, {"prompt": "a", "n": "2"}, "n", "'n' is \"2\": it must be a whole number"),
    (COMPLETIONS, {"prompt": "a", "n": True}, "n", "'n' is true: it must be a whole number"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature", "a number from 0 to 100"),
    (COMPLETIONS, {"prompt": "a", "temperature": 1e6}, "temperature", "a number from 0 to 100"),
    (COMPLETIONS, {"prompt": "a", "top_p": -0.1}, "top_p", "a number from 0 to 1"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, "max_tokens", "a whole number from 0"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 2.5}, "max_tokens", "'max_tokens' is 2.5: it must be a whole number"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 4, "min_tokens": 5}, "min_tokens", "must not exceed max_tokens"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs", "from 0 to 20"),
    (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 17}, "stop", "a list of at most 16 entries"),
    (COMPLETIONS, {"prompt": "a", "stop": "x" * 257}, "stop", "a text of 1 to 256 characters"),
    (COMPLETIONS, {"prompt": "a", "stop": "é" * 200}, "stop.0", "400 bytes; the limit is 256"),
    (COMPLETIONS, {"prompt": "a", "stop": ["", 1]}, "stop.0", "a text of 1 to 256 characters"),
    (
        COMPLETIONS,
        {"prompt": "a", "logit_bias": {str(i): 1 for i in range(MAX_LOGIT_BIAS + 1)}},
        "logit_bias",
        f"an object of at most {MAX_LOGIT_BIAS} entries",
    ),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"4096": 1}}, "logit_bias", "ends at 4095"),
    (
        COMPLETIONS,
        {"prompt": "a", "logit_bias": {"x": 1}},
        "logit_bias",
        "A key of 'logit_bias' is wrong: it must be a whole number",
    ),
    (
        COMPLETIONS,
        {"prompt": "a", "logit_bias": {"1": 101}},
        "logit_bias",
        "each value must be a number from -100 to 100",
    ),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": [5000]}, "stop_token_ids", "ends at 4095"),
    (COMPLETIONS, {"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids", "a list of 1 to 65536 entries"),
    (COMPLETIONS, {"prompt": "a", "bad_words": ["x"] * 257}, "bad_words", "a list of at most 256 entries"),
    (COMPLETIONS, {"prompt": "a", "best_of": 4}, "best_of", "'best_of' is 4 and 'n' is 1"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
    (COMPLETIONS, {"prompt": "a", "stream_options": {}}, "stream_options", "needs stream"),
    (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "cannot be streamed"),
    (COMPLETIONS, {"prompt": "a", "priority": 1}, "priority", "no effect with the scheduling policy 'fcfs'"),
    (COMPLETIONS, {"prompt": "a", "deadline_s": 1}, "deadline_s", "--scheduling-policy deadline"),
    (COMPLETIONS, {"prompt": []}, "prompt", "empty"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt", "no tokens"),
    (COMPLETIONS, {"prompt": ["a", 1]}, "prompt", "mixes"),
    (COMPLETIONS, {"prompt": ["a"] * 65}, "prompt", "65 prompts; the limit is 64"),
    (COMPLETIONS, {"prompt": [4096]}, "prompt", "token 4096"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt", "token -1"),
    (COMPLETIONS, {"prompt": [2**40]}, "prompt", "tokens 0 to 4095"),
    (COMPLETIONS, {"prompt": {"a": 1}}, "prompt", "'prompt' is {\"a\":1}: it must be a text or a list."),
    (COMPLETIONS, {"prompt": "\ud800"}, "", ""),
    (COMPLETIONS, {}, "prompt", "'prompt' is missing."),
    (COMPLETIONS, {"prompt": "a", "prompt_embeds": "AAAA"}, "prompt_embeds", "Send text or token ids"),
    (CHAT, {"messages": []}, "messages", "a list of 1 to 4096 entries"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "'messages.0.role' is \"king\""),
    (CHAT, {"messages": [{"role": "user", "content": "x", "nam": "y"}]}, "messages.0.nam", "Did you mean 'name'?"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
        "messages.0.content.0.type",
        "Images are not supported: the model 'parrot' takes text only.",
    ),
    (CHAT, {"messages": USER, "tools": [{}]}, "tools.0.function", "'tools.0.function' is missing."),
    (CHAT, {"messages": USER, "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    (CHAT, {"messages": USER, "max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "send one"),
    (CHAT, {"messages": USER, "chat_template": "{{ 1 }}"}, "chat_template", "--chat-template FILE"),
    (
        CHAT,
        {"messages": USER, "chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs.messages",
        "may not set",
    ),
    (
        CHAT,
        {"messages": USER, "chat_template_kwargs": {"a": [0.5] * 1025}},
        "chat_template_kwargs",
        "a list of at most 1024",
    ),
    (CHAT, {"messages": USER, "chat_template_kwargs": {"__class__": 1}}, "chat_template_kwargs.__class__", "may not"),
    (CHAT, {"messages": USER, "user": "x" * 513}, "user", "a text of at most 512 characters"),
    ("/tokenize", {}, "prompt", "Exactly one"),
    ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", "no effect"),
    ("/detokenize", {"tokens": [4096]}, "tokens", "ends at 4095"),
    ("/detokenize", {"tokens": [1] * 100_000}, "tokens", "the limit is the context"),
]


@pytest.mark.parametrize(("path", "body", "param", "words"), FIELDS)
def test_a_wrong_field_is_named(server: RunningServer, path: str, body: dict[str, Any], param: str, words: str) -> None:
    error = refuse(server, path, body)
    assert words in error["message"]
    assert (error["param"] or "") == param


BODIES = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"null", "'body' is null"),
    (b"[]", "'body' is []"),
    (b'{"prompt": "a"} x', "not valid JSON"),
    (b'{"prompt": "a", "temperature": NaN}', "not valid JSON"),
    (b'{"prompt": "a", "temperature": Infinity}', "not valid JSON"),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    (b'{"prompt": "\xff\xfe"}', "not valid JSON"),
    (b"\x80\x04\x95pickle", "not valid JSON"),
    (b"[" * 2_000_000 + b"]" * 2_000_000, "nested deeper than 64"),
    (b'{"prompt": "a", "metadata": ' + b'{"a":' * 70 + b"1" + b"}" * 71, "nested deeper than 64"),
    (b'{"messages": ' + b"[" * 100_000, "nested deeper than 64"),
]


@pytest.mark.parametrize(("body", "words"), BODIES, ids=range(len(BODIES)))
def test_a_body_that_is_no_request(server: RunningServer, body: bytes, words: str) -> None:
    assert words in refuse(server, COMPLETIONS, body)["message"]


def test_brackets_inside_of_text_are_text(server: RunningServer) -> None:
    assert server.post(COMPLETIONS, prompt='[{"\\' * 70, max_tokens=1).status_code == 200


def test_longer_than_the_context(server: RunningServer) -> None:
    error = refuse(server, COMPLETIONS, {"prompt": [5] * 600})
    assert error["code"] == "context_length_exceeded"
    assert "600 tokens; the context of 512 tokens" in error["message"]
    error = refuse(server, COMPLETIONS, {"prompt": [5] * 500, "max_tokens": 100})
    assert error["code"] == "context_length_exceeded"
    assert "500 of the prompt leave room for 12, but max_tokens is 100" in error["message"]
    error = refuse(server, COMPLETIONS, {"prompt": "a b " * 500_000})
    assert "has 2000000 characters" in error["message"]


def test_an_unknown_model(server: RunningServer) -> None:
    error = refuse(server, CHAT, {"messages": USER, "model": "gpt-9"}, status=404)
    assert error["code"] == "model_not_found"
    assert error["message"] == "The model 'gpt-9' does not exist. This server has 'parrot'."
    assert server.http.get("/v1/models/gpt-9").status_code == 404
    assert server.http.get("/v1/models/../../etc/passwd").status_code == 404
    assert server.http.get("/v1/models/parrot").json()["id"] == "parrot"


def test_a_body_that_is_too_large(server: RunningServer) -> None:
    big = b'{"prompt": "' + b"a" * (5 << 20) + b'"}'
    assert refuse(server, COMPLETIONS, big, status=413)["code"] == "request_too_large"

    def chunks() -> Any:  # no Content-Length: found out while reading
        for _ in range(100):
            yield b" " * 65536

    response = server.http.post(COMPLETIONS, content=chunks(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413


def test_unknown_paths_methods_and_content_types(server: RunningServer) -> None:
    missing = server.http.get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert missing.headers["x-request-id"]
    wrong = server.http.get(CHAT)
    assert (wrong.status_code, wrong.json()["error"]["code"], wrong.headers["allow"]) == (
        405,
        "method_not_allowed",
        "POST",
    )
    form = server.http.post(CHAT, data={"a": "b"})
    assert (form.status_code, form.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_request_ids_are_ours(server: RunningServer) -> None:
    response = server.http.get("/livez", headers={"X-Request-Id": "mine"})
    assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    "raw",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET http://evil/livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET //livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"X" * 200_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=range(9),
)
def test_bytes_that_are_no_http(server: RunningServer, raw: bytes) -> None:
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=60) as client:
        with contextlib.suppress(OSError):  # it may have closed the connection already
            client.sendall(raw)
            client.shutdown(socket.SHUT_WR)
        answer = client.recv(65536)
    assert not answer.startswith(b"HTTP/1.1 5")
    if answer.startswith(b"HTTP/1.1 400"):
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_a_head_without_end(server: RunningServer) -> None:
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=60) as client:
        with contextlib.suppress(OSError):
            client.sendall(b"GET /livez HTTP/1.1\r\nX-Long: " + b"a" * (1 << 20))
        assert client.recv(64).startswith(b"HTTP/1.1 431")


def test_a_client_that_stops_in_the_middle_of_its_body(server: RunningServer) -> None:
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert server.http.get("/readyz").status_code == 200
    server.until(lambda: server.post("/admin/resume").json()["running_http_requests"] == 0)


def test_odd_requests_add_no_time_series(server: RunningServer) -> None:
    before = server.http.get("/metrics").text.count("\n")
    for i in range(50):
        server.http.request(f"METHOD{i}", f"/path/{i}")
        server.post(COMPLETIONS, prompt="a", model=f"model{i}")
    assert server.http.get("/metrics").text.count("\n") == before


def test_refusals_are_counted_by_reason(server: RunningServer) -> None:
    def refused(reason: str) -> float:
        return server.figure(f'powerband_requests_refused_total{{engine="0",model_name="parrot",reason="{reason}"}}')

    before = refused("invalid_request"), refused("context_length_exceeded")
    refuse(server, COMPLETIONS, {"prompt": []})
    refuse(server, COMPLETIONS, {"prompt": [5] * 600})
    assert (refused("invalid_request"), refused("context_length_exceeded")) == (before[0] + 1, before[1] + 1)


def test_the_server_is_as_well_as_before(server: RunningServer) -> None:
    assert server.http.get("/readyz").json()["engine_restarts"] == 0
    assert server.post(COMPLETIONS, prompt="a b c", max_tokens=3).status_code == 200
    server.until(lambda: server.figure("powerband_kv_cache_usage_ratio") == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_of_http_1_0_gets_no_chunks(server: RunningServer, stream: bool) -> None:
    """RFC 9112, 6.1: no Transfer-Encoding for HTTP/1.0; the end of the connection ends the stream."""
    body = json.dumps({"prompt": "a b", "max_tokens": 2, "stream": stream}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=30) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    lines, _, content = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in lines.lower()
    assert content.startswith(b"data: {" if stream else b"{")
    assert content.endswith(b"data: [DONE]\n\n" if stream else b"}")
