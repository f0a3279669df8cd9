"""`previous_response_id`, and the stored responses of OpenAI's Responses API: GET and DELETE /v1/responses/ID.

Replicas need no state: the gateway writes the conversation before a request into its `input`.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Raw
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from powerband.errors import InvalidRequest
from powerband.gateway.accounts.accounts import Accounts
from powerband.gateway.accounts.keys import Key
from powerband.gateway.accounts.responses import ResponseStore, StoredResponse, listed, too_large
from powerband.gateway.gateway import Gateway
from powerband.gateway.proxy.pass_through.request import PassThroughFields
from powerband.gateway.request import ANONYMOUS
from powerband.openai.chunks import FIELDS
from powerband.web.body import decode
from powerband.web.errors import HttpError, json_response

_NAME = "previous_response_id"
_MAX_LISTED = 100
_NOT_STORED = HttpError(
    404,
    "responses_not_stored",
    "This gateway stores no responses.",
    hint="Its operator can start it with --store-content.",
)


class _Fields(PassThroughFields):
    previous_response_id: str | None = None


@dataclass(frozen=True, slots=True)
class ResponseToStore:
    """A response that is stored when it is complete. input: the items of its request alone, as JSON."""

    responses: ResponseStore
    id: str
    key_id: str
    request_id: str
    previous_id: str | None
    input: bytes

    @property
    def fields(self) -> dict[str, Any]:
        """Of the response, instead of the replica's."""
        return {"id": self.id, "previous_response_id": self.previous_id, "store": True}

    def keep(self, response: bytes) -> None:
        self.responses.note(
            self.key_id, self.request_id, self.id, self.previous_id, StoredResponse(self.input, response)
        )


@dataclass(frozen=True, slots=True)
class ContinuedRequest:
    """data: the body, with the conversation before it in its input. items: of its own input, None if it has no list."""

    data: bytes
    fields: _Fields
    items: bytes | None


async def with_conversation(
    gateway: Gateway, responses: ResponseStore, request: Request, data: bytes
) -> ContinuedRequest:
    """Write the conversation that `previous_response_id` names into a request. Raises PowerbandError."""
    max_bytes = gateway.settings.max_body_bytes
    fields, raw = await gateway.decode(request, data, _parse)
    previous, items = fields.previous_response_id or None, _items(raw)
    if previous is not None:
        if items is None:
            raise InvalidRequest("'input' must be a text, or a list of items.", param="input")
        before = await responses.conversation(_key_id(request), previous, max_bytes)
        raw["input"] = Raw(b"[%b]" % b",".join([*before, *([items] if items else [])]))
        if len(bytes(raw["input"])) > max_bytes:
            raise too_large(previous, max_bytes)
    if raw.pop(_NAME, None) is not None:
        data = msgspec.json.encode(raw)
    return ContinuedRequest(data, fields, items)


async def prepare(gateway: Gateway, responses: ResponseStore, request: Request) -> PreparedRequest:
    """Write the conversation before a request into it. Raises PowerbandError."""
    data = await gateway.read_body(request)
    if not responses.on:
        return PreparedRequest(data)
    continued = await with_conversation(gateway, responses, request, data)
    if continued.fields.store is False:
        return PreparedRequest(continued.data, is_private=True)
    if continued.items is None:
        return PreparedRequest(continued.data)  # the replica refuses it
    id = f"resp_{secrets.token_hex(24)}"  # cannot be guessed
    previous = continued.fields.previous_response_id or None
    kept = ResponseToStore(
        responses, id, _key_id(request), request.state.request_id, previous, b"[%b]" % continued.items
    )
    return PreparedRequest(continued.data, kept)


def _parse(data: bytes) -> tuple[_Fields, dict[str, Raw]]:
    return decode(data, _Fields), FIELDS.decode(data)


def _items(fields: dict[str, Raw]) -> bytes | None:
    """The items of the input, without the brackets around them. None: it is neither a text nor a list."""
    sent = bytes(fields.get("input", b"")).strip()
    if sent[:1] == b'"':
        return b'{"role":"user","content":%b}' % sent
    return sent[1:-1].strip() if sent[:1] == b"[" else None


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """data: the body for a replica. kept: the response to store. is_private: the client wants nothing of it stored."""

    data: bytes
    kept: ResponseToStore | None = None
    is_private: bool = False


def _page(input: bytes, id: str, limit: int, order: str, after: str | None) -> dict[str, Any]:
    """Some of the items of a response's input. Raises InvalidRequest."""
    items = listed(msgspec.json.decode(input), id)
    if order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    if after is not None:
        if after not in ids:
            raise InvalidRequest(f"'after' is {after[:80]!r}, which is no item of this response.", param="after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    has_more = len(items) > len(page)
    return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": has_more}


def _key_id(request: Request) -> str:
    key: Key | None = request.state.key
    return ANONYMOUS if key is None else key.id


def make_routes(accounts: Accounts) -> list[Route]:
    routes = StoredResponseRoutes(accounts.responses)
    return [
        Route("/v1/responses/{id}", routes.get, methods=["GET"]),
        Route("/v1/responses/{id}", routes.delete, methods=["DELETE"]),
        Route("/v1/responses/{id}/input_items", routes.input_items, methods=["GET"]),
    ]


class StoredResponseRoutes:
    """As OpenAI's client calls them."""

    def __init__(self, responses: ResponseStore) -> None:
        self._responses = responses

    async def get(self, request: Request) -> Response:
        if request.query_params.get("stream", "false") not in ("false", "0"):
            raise InvalidRequest("'stream' is not supported here.", hint="Leave it out.", param="stream")
        return Response((await self._find(request)).response, media_type="application/json")

    async def delete(self, request: Request) -> Response:
        self._check_is_on()
        id = request.path_params["id"]
        await self._responses.delete(_key_id(request), id)
        return json_response({"id": id, "object": "response", "deleted": True})

    async def input_items(self, request: Request) -> Response:
        """The items of the response's own request: those of the conversation before it belong to that."""
        query = request.query_params
        limit, order, after = query.get("limit", "20"), query.get("order", "desc"), query.get("after")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= _MAX_LISTED):
            raise InvalidRequest(f"'limit' is {limit[:20]!r}; it must be 1 to {_MAX_LISTED}.", param="limit")
        if order not in ("asc", "desc"):
            raise InvalidRequest(f"'order' is {order[:20]!r}; it must be asc or desc.", param="order")
        stored = await self._find(request)
        # In a thread, because there may be thousands.
        page = await asyncio.to_thread(_page, stored.input, request.path_params["id"], int(limit), order, after)
        return json_response(page)

    async def _find(self, request: Request) -> StoredResponse:
        self._check_is_on()
        return await self._responses.get(_key_id(request), request.path_params["id"])

    def _check_is_on(self) -> None:
        if not self._responses.on:
            raise _NOT_STORED
