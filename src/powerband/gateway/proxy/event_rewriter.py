"""Rewrites a replica's events for the client: without the fields that only the gateway requested, and with the served
model name. When another replica resumes the stream, `id` and `created` stay those that the client saw first.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from powerband.gateway.proxy.client_request import ClientRequest
from powerband.gateway.routes import ReplicaAddress
from powerband.openai.chunks import FIELDS, NO_IDS, Chunk, ChunkUsage, has_ids
from powerband.openai.events import event

# Fields that stay the same through a stream, besides the model.
_STABLE_FIELDS = ("id", "created", "system_fingerprint")
_MAX_STABLE_BYTES = 512  # larger ones would be repeated with every event after a failover
_ENCODE = msgspec.json.Encoder().encode
_CHOICES = msgspec.json.Decoder(list[dict[str, Raw]])


class EventRewriter:
    """has_sent_usage: the client has the usage of the whole response."""

    def __init__(self, client_request: ClientRequest, model: str) -> None:
        """model: the served name."""
        self._client_request = client_request
        self._model, self._encoded_model = model, Raw(_ENCODE(model))
        self._wants_usage = client_request.wants_usage
        self._wants_ids = bool(client_request.fields.return_token_ids)
        self._strips_usage = False  # remove usage from chunks with choices: only the gateway requested it
        self._stable_fields: dict[str, Raw] = {}
        self.has_sent_usage = False
        self.is_resumed = False
        self._converts_to_chat = False  # the current replica sends completions, but the client requested chat
        self._text_offset = 0  # added to the current replica's `text_offset`, which starts at 0
        self._num_in_prompt = 0  # output tokens that the current replica counts as prompt

    def begin(self, replica: ReplicaAddress) -> None:
        """The next events come from this replica."""
        client_request = self._client_request
        self._strips_usage = client_request.returns_usage(replica) and not client_request.wants_continuous_usage

    def resume(self, *, converts_to_chat: bool, text_offset: int, num_in_prompt: int) -> None:
        self.is_resumed = True
        self._converts_to_chat, self._text_offset, self._num_in_prompt = converts_to_chat, text_offset, num_in_prompt

    def rewrite(self, data: bytes, chunk: Chunk) -> bytes:
        """The event for the client: the original bytes, if nothing has to change."""
        if not self._stable_fields:
            first = FIELDS.decode(data)
            self._stable_fields = {
                name: first[name] for name in _STABLE_FIELDS if name in first and len(first[name]) <= _MAX_STABLE_BYTES
            }
        returns_usage = self._wants_usage and not (chunk.choices and self._strips_usage)
        if returns_usage and chunk.usage is not None and not chunk.choices:
            self.has_sent_usage = True
        if not (self.is_resumed or chunk.model != self._model or self._has_too_much(chunk, returns_usage)):
            return event(data)
        fields: dict[str, Any] = FIELDS.decode(data)
        fields["model"] = self._encoded_model
        if chunk.choices:
            choices = fields["choices"] = _CHOICES.decode(fields["choices"])
            for read, choice in zip(chunk.choices, choices, strict=True):
                if self.is_resumed and "text" in choice:
                    choice["text"] = Raw(_ENCODE(read.text))  # without the part that the client has
                self._rewrite_choice(choice)
        if not self._wants_ids or self.is_resumed:
            fields.pop("prompt_token_ids", None)
        if not returns_usage:
            fields.pop("usage", None)
        if self.is_resumed:
            fields |= self._stable_fields
            if self._converts_to_chat:
                fields["object"] = "chat.completion.chunk"
            if chunk.usage is not None and self._num_in_prompt and returns_usage:
                fields["usage"] = self._with_earlier_usage(fields["usage"], chunk.usage)
        return event(_ENCODE(fields))

    def build(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        """An event of the gateway's own."""
        kind = "chat.completion.chunk" if self._client_request.endpoint == "chat" else "text_completion"
        return event(_ENCODE({**self._stable_fields, "model": self._model, "object": kind, "choices": choices, **more}))

    def _has_too_much(self, chunk: Chunk, returns_usage: bool) -> bool:
        """Whether a chunk has fields that only the gateway requested, or an empty finish_reason instead of null."""
        if chunk.usage is not None and not returns_usage:
            return True
        if chunk.prompt_token_ids is not NO_IDS and has_ids(chunk.prompt_token_ids) and not self._wants_ids:
            return True
        for choice in chunk.choices or ():
            if choice.finish_reason == "":
                return True
            if not self._wants_ids and (choice.token_ids is not None or has_ids(choice.prompt_token_ids)):
                return True
        return False

    def _rewrite_choice(self, choice: dict[str, Any]) -> None:
        if not self._wants_ids or self.is_resumed:
            choice.pop("prompt_token_ids", None)
        if "finish_reason" in choice and bytes(choice["finish_reason"]) == b'""':
            choice["finish_reason"] = None
        if self._text_offset and "logprobs" in choice:
            choice["logprobs"] = _shifted(choice["logprobs"], self._text_offset)
        if self._converts_to_chat:
            text = choice.pop("text", None)
            choice["delta"] = {"content": text} if text or "token_ids" in choice else {}
        if not self._wants_ids:
            choice.pop("token_ids", None)

    def _with_earlier_usage(self, data: Raw, usage: ChunkUsage) -> dict[str, Any]:
        """The usage with earlier output, which was in this replica's prompt, counted as output."""
        counted = {
            "prompt_tokens": max(0, (usage.prompt_tokens or 0) - self._num_in_prompt),
            "completion_tokens": (usage.completion_tokens or 0) + self._num_in_prompt,
        }
        return {**FIELDS.decode(data), **counted}


def _shifted(logprobs: Raw, offset: int) -> Any:
    """A completion's log-probabilities with `offset` added to their `text_offset`."""
    found = msgspec.json.decode(logprobs)
    if isinstance(found, dict) and isinstance(places := found.get("text_offset"), list):
        found["text_offset"] = [place + offset if isinstance(place, int) else place for place in places]
    return found
