"""What vLLM responds at the endpoints that a gateway passes through: the shapes of vLLM 0.20, without a model."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from byte_replica import ByteReplica, answer, byte_replica

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
WORDS = ("It", " is", " sunny", ".")
TEXT = "".join(WORDS)
VECTOR = (0.5, -0.25, 1.0)
CALL = {"name": "weather", "arguments": '{"city": "Oslo"}'}
Event = dict[str, Any]
_USAGE = {"input_tokens": 7, "output_tokens": 4, "total_tokens": 11}
USAGE = {**_USAGE, "input_tokens_details": {"cached_tokens": 2}, "output_tokens_details": {"reasoning_tokens": 1}}


def embeddings(body: Event) -> Event:
    texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
    packed = base64.b64encode(struct.pack("<3f", *VECTOR)).decode()
    vector = packed if body.get("encoding_format") == "base64" else list(VECTOR)
    data = [{"object": "embedding", "index": place, "embedding": vector} for place in range(len(texts))]
    usage = {"prompt_tokens": 3 * len(texts), "total_tokens": 3 * len(texts), "completion_tokens": 0}
    return {"id": "embd-1", "object": "list", "created": 1, "model": body["model"], "data": data, "usage": usage}


def rerank(body: Event) -> Event:
    ranked = list(enumerate(body["documents"]))[:: -1 if body["query"] else 1]
    results = [
        {"index": place, "document": {"text": text}, "relevance_score": 1.0 / (1 + rank)}
        for rank, (place, text) in enumerate(ranked)
    ]
    usage = {"prompt_tokens": 20, "total_tokens": 20}
    return {"id": "rerank-1", "model": body["model"], "usage": usage, "results": results}


def score(body: Event) -> Event:
    texts = body["text_2"] if isinstance(body["text_2"], list) else [body["text_2"]]
    data = [{"index": place, "object": "score", "score": 0.5} for place in range(len(texts))]
    usage = {"prompt_tokens": 8, "total_tokens": 8, "completion_tokens": 0}
    return {"id": "score-1", "object": "list", "created": 1, "model": body["model"], "data": data, "usage": usage}


def classify(body: Event) -> Event:
    data = [{"index": 0, "label": "good", "probs": [0.25, 0.75], "num_classes": 2}]
    usage = {"prompt_tokens": 5, "total_tokens": 5, "completion_tokens": 0}
    return {"id": "classify-1", "object": "list", "created": 1, "model": body["model"], "data": data, "usage": usage}


# ---- OpenAI's Responses


def response(body: Event, *, status: str = "completed", usage: Event | None = USAGE) -> Event:
    text = {"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}
    message = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [text]}
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    call = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "status": "completed", **CALL}
    output = [thought, call if body.get("tools") else message] if status == "completed" else []
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "status": status,
        "model": body["model"],
        "output": output,
        "instructions": body.get("instructions"),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": body.get("tools", []),
        "usage": usage if status == "completed" else None,
        "error": None,
        "store": body.get("store"),
    }


def response_events(body: Event) -> list[Event]:
    at = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    events = [
        {"type": "response.created", "response": response(body, status="in_progress")},
        {"type": "response.in_progress", "response": response(body, status="in_progress")},
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        {"type": "response.content_part.added", **at, "part": part},
        *({"type": "response.output_text.delta", **at, "delta": word, "logprobs": []} for word in WORDS),
        {"type": "response.output_text.done", **at, "text": TEXT, "logprobs": []},
        {"type": "response.content_part.done", **at, "part": {**part, "text": TEXT}},
        {
            "type": "response.output_item.done",
            "output_index": 0,
            "item": {**item, "status": "completed", "content": [{**part, "text": TEXT}]},
        },
        {"type": "response.completed", "response": response(body)},
    ]
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


# ---- Anthropic's Messages


def message(body: Event) -> Event:
    content = [{"type": "text", "text": TEXT}]
    if body.get("tools"):
        content = [{"type": "tool_use", "id": "call_1", "name": CALL["name"], "input": json.loads(CALL["arguments"])}]
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "content": content,
        "model": body["model"],
        "stop_reason": "tool_use" if body.get("tools") else "end_turn",
        "usage": {"input_tokens": 7, "output_tokens": 4},
    }


def message_events(body: Event) -> list[Event]:
    start = {**message(body), "content": [], "stop_reason": None, "usage": {"input_tokens": 7, "output_tokens": 0}}
    return [
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}} for word in WORDS),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn"},
            "usage": {"input_tokens": 7, "output_tokens": 4},
        },
        {"type": "message_stop"},
    ]


# ---- chats with tools and reasoning


def _calls() -> list[Event]:
    return [{"id": f"call_{n}", "type": "function", "function": CALL} for n in range(2)]


def chat(body: Event) -> Event:
    calls = _calls() if body.get("tools") and body.get("tool_choice") != "none" else []
    message = {"role": "assistant", "content": None if calls else TEXT, "tool_calls": calls, "reasoning": "hm"}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls" if calls else "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16, "prompt_tokens_details": None}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{**choice, "stop_reason": None, "token_ids": None}],
        "usage": usage,
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "kv_transfer_params": None,
    }


def chat_events(body: Event) -> list[Event]:
    """The arguments of a call come in pieces; with return_token_ids each chunk has the ids of its tokens."""
    deltas: list[Event] = [{"role": "assistant", "content": ""}, {"reasoning": "h"}, {"reasoning": "m"}]
    if body.get("tools"):
        for place, call in enumerate(_calls()):
            begun = {**call, "index": place, "function": {"name": CALL["name"], "arguments": ""}}
            deltas.append({"tool_calls": [begun]})
            pieces = [{"index": place, "function": {"arguments": piece}} for piece in ('{"city"', ': "Oslo"}')]
            deltas += [{"tool_calls": [piece]} for piece in pieces]
    else:
        deltas += [{"content": word} for word in WORDS]
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
    events = []
    for number, delta in enumerate(deltas):
        choice: Event = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        if body.get("return_token_ids") and number:
            choice["token_ids"] = [number]
        events.append({**head, "choices": [choice]})
    if body.get("return_token_ids"):
        events[0]["prompt_token_ids"] = list(range(7))
    last = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls" if body.get("tools") else "stop"}
    events.append({**head, "choices": [{**last, "stop_reason": None}]})
    usage = {"prompt_tokens": 7, "completion_tokens": len(deltas), "total_tokens": 7 + len(deltas)}
    return [*events, {**head, "choices": [], "usage": usage}]


# ---- the replica

WHOLE: dict[str, Callable[[Event], Event]] = {
    "/v1/embeddings": embeddings,
    "/v1/rerank": rerank,
    "/rerank": rerank,
    "/v2/rerank": rerank,
    "/v1/score": score,
    "/score": score,
    "/pooling": embeddings,
    "/classify": classify,
    "/v1/responses": response,
    "/v1/messages": message,
    "/v1/messages/count_tokens": lambda _: {"input_tokens": 7},
    "/v1/chat/completions": chat,
}
STREAMS = {"/v1/responses": response_events, "/v1/messages": message_events, "/v1/chat/completions": chat_events}


def as_frames(events: Sequence[Event]) -> list[bytes]:
    """Each event as a chunk of the chunked coding."""
    types = [f"event: {event['type']}\n" if "type" in event else "" for event in events]
    lines = [f"{kind}data: {json.dumps(event)}\n\n".encode() for kind, event in zip(types, events, strict=True)]
    return [b"%x\r\n%b\r\n" % (len(line), line) for line in lines]


def respond(path: str, body: Event) -> bytes:
    if path not in WHOLE:
        return answer('{"detail":"Not Found"}', status=404)
    if body.get("stream"):
        done = b"e\r\ndata: [DONE]\n\n\r\n" if path == "/v1/chat/completions" else b""
        return b"".join((CHUNKED, *as_frames(STREAMS[path](body)), done, b"0\r\n\r\n"))
    return answer(json.dumps(WHOLE[path](body)))


class Held(bytes):
    """After these bytes the connection stays open."""


@contextlib.contextmanager
def vllm_replica(respond: Callable[[str, Event], bytes] = respond) -> Iterator[ByteReplica]:
    """respond: path and body of a request → the bytes of the response, after which the connection closes unless they
    are complete.
    """
    with byte_replica(owner="vllm", paths=("/v1/models", "/health")) as replica:

        async def play(writer: asyncio.StreamWriter, body: Event) -> None:
            data = respond(replica.post_paths[-1], body)
            writer.write(data)
            if not (data.endswith((b"0\r\n\r\n", b"}")) or isinstance(data, Held)):
                await writer.drain()
                writer.close()

        replica.play = play
        yield replica
