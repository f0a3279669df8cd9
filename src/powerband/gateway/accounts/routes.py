"""Routes of the account database: keys, usage, audit, feedback and content under /admin; /v1/feedback for clients."""

from __future__ import annotations

import math
import re
import time
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from powerband.errors import InvalidRequest
from powerband.gateway.accounts.accounts import Accounts, actor_of
from powerband.gateway.accounts.audit import entries, verify_chain
from powerband.gateway.accounts.feedback import read_feedback
from powerband.gateway.accounts.keys import MAX_LIMIT, Key, KeyLimits
from powerband.gateway.accounts.store import StoreUnavailable
from powerband.gateway.accounts.transcripts import stored
from powerband.gateway.accounts.usage import UsageRow, report
from powerband.gateway.request import ANONYMOUS
from powerband.web.body import read_json
from powerband.web.errors import HttpError, json_response

MAX_BODY_BYTES = 64 << 10
_MAX_ROWS = 1000
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])", re.ASCII)

Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_LIMIT)]


class LimitsBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A missing field leaves its limit as it is; null lifts it. See keys.KeyLimits."""

    requests_per_min: Count | msgspec.UnsetType | None = msgspec.UNSET
    tokens_per_min: Count | msgspec.UnsetType | None = msgspec.UNSET
    max_concurrency: Count | msgspec.UnsetType | None = msgspec.UNSET
    usd: float | msgspec.UnsetType | None = msgspec.UNSET
    usd_period: Literal["month", "total"] | msgspec.UnsetType = msgspec.UNSET
    priority: int | msgspec.UnsetType = msgspec.UNSET
    models: list[str] | msgspec.UnsetType = msgspec.UNSET

    def applied_to(self, limits: KeyLimits) -> KeyLimits:
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        changes = {name: value for name, value in fields.items() if value is not msgspec.UNSET}
        if "models" in changes:
            changes["models"] = tuple(changes["models"])
        return replace(limits, **changes)


class KeyBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    scopes: list[str] = msgspec.field(default_factory=lambda: ["infer"])
    limits: LimitsBody = msgspec.field(default_factory=LimitsBody)
    expires_in_s: Annotated[float, msgspec.Meta(gt=0, le=100 * 366 * 86400)] | None = None
    unique_name: bool = False  # refuse the name of a valid key


class KeyPatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    limits: LimitsBody


class AuditBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    action: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    what: dict[str, Any] = {}


class FeedbackBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    request_id: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    score: float
    comment: str = ""


def make_routes(accounts: Accounts) -> list[Route]:
    """Routes for keys, usage and audit. The middleware has checked the scopes."""
    keys, reports = KeyRoutes(accounts), ReportRoutes(accounts)
    return [
        Route("/admin/keys", keys.list, methods=["GET"]),
        Route("/admin/keys", keys.create, methods=["POST"]),
        Route("/admin/keys/{id}", keys.show, methods=["GET"]),
        Route("/admin/keys/{id}", keys.limit, methods=["PATCH"]),
        Route("/admin/keys/{id}", keys.revoke, methods=["DELETE"]),
        Route("/admin/usage", reports.usage, methods=["GET"]),
        Route("/admin/audit", reports.audit, methods=["GET"]),
        Route("/admin/audit", reports.note, methods=["POST"]),
        Route("/admin/feedback", reports.feedback, methods=["GET"]),
        Route("/admin/content", reports.content, methods=["GET"]),
        Route("/admin/content", reports.forget, methods=["DELETE"]),
        Route("/v1/feedback", reports.give_feedback, methods=["POST"]),
    ]


class KeyRoutes:
    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    async def list(self, _request: Request) -> Response:
        return json_response({"object": "list", "data": [self._shown(key) for key in self._accounts.keys.list()]})

    async def show(self, request: Request) -> Response:
        return json_response(self._shown(self._accounts.keys.get(request.path_params["id"])))

    async def create(self, request: Request) -> Response:
        """The only response that contains the key itself, as 'secret'."""
        body = await read_json(request, KeyBody, MAX_BODY_BYTES)
        limits = body.limits.applied_to(KeyLimits())
        if body.unique_name:
            self._accounts.keys.check_name_is_free(body.name)
        expires_at = None if body.expires_in_s is None else time.time() + body.expires_in_s
        key, secret = self._accounts.keys.create(body.name, body.scopes, limits=limits, expires_at=expires_at)
        self._note(request, "keys.create", key, {"scopes": key.scopes, "limits": asdict(limits)})
        try:
            await self._accounts.store.saved()
        except StoreUnavailable:
            self._accounts.keys.revoke(key.id)  # its secret was not sent to anyone
            raise
        return json_response(self._shown(key) | {"secret": secret}, 201, {"cache-control": "no-store"})

    async def limit(self, request: Request) -> Response:
        body = await read_json(request, KeyPatch, MAX_BODY_BYTES)
        before = self._accounts.keys.get(request.path_params["id"])
        key = self._accounts.keys.limit(before.id, body.limits.applied_to(before.limits))
        self._note(request, "keys.limit", key, {"limits": asdict(key.limits)})
        await self._accounts.store.saved()
        return json_response(self._shown(key))

    async def revoke(self, request: Request) -> Response:
        """In effect before the response; running requests of the key may finish."""
        keys = self._accounts.keys
        key = keys.get(request.path_params["id"])
        if keys.admins() == (key,):
            hint = "Create another admin key first, and use that."
            raise HttpError(409, "last_admin_key", "This is the gateway's last admin key.", hint=hint)
        key = keys.revoke(key.id)
        self._note(request, "keys.revoke", key, {})
        await self._accounts.store.saved()
        return json_response(self._shown(key))

    def _note(self, request: Request, action: str, key: Key, what: dict[str, Any]) -> None:
        self._accounts.audit(actor_of(request), action, {"key": key.id, "name": key.name, **what})

    def _shown(self, key: Key) -> dict[str, Any]:
        return asdict(key) | {"object": "key", "used": self._accounts.limits.used(key)}


class ReportRoutes:
    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    async def usage(self, request: Request) -> Response:
        by = [name for name in request.query_params.get("by", "key,model").split(",") if name]
        now = time.time()
        since = _since(request, "24h", now)
        if len(set(by)) != len(by):
            raise InvalidRequest(f"'by' is {','.join(by)!r}; name each only once.", param="by")
        rows = await self._accounts.store.read_latest(lambda connection: report(connection, by, since, now))
        total = await self._accounts.store.query(lambda connection: report(connection, [], since, now))
        names = {key.id: key.name for key in self._accounts.keys.list()}
        data = [asdict(row) | {"key_name": names.get(row.key, row.key)} for row in rows]
        state = asdict(self._accounts.figures())
        return json_response(
            {
                "since": since,
                "by": by,
                "data": data,
                "total": asdict(next(iter(total), UsageRow())),
                "database": state,
                "books": state,  # its name in the version before
            }
        )

    async def audit(self, request: Request) -> Response:
        """With check=1 also broken_at: the number of the first entry that is missing or was changed; null: the chain is
        intact."""
        after, limit = _number(request, "after", 0), _number(request, "limit", 100)
        found = await self._accounts.store.read_latest(lambda connection: entries(connection, after, limit))
        body: dict[str, Any] = {"object": "list", "data": [asdict(entry) for entry in found]}
        if request.query_params.get("check") == "1":
            head = self._accounts.audit_head
            check = partial(verify_chain, head=head)
            body["broken_at"] = await self._accounts.store.query(lambda connection: check(entries(connection)))
            body["head"] = {"seq": head.seq, "hash": head.hash}
        return json_response(body)

    async def note(self, request: Request) -> Response:
        body = await read_json(request, AuditBody, MAX_BODY_BYTES)
        self._accounts.audit(actor_of(request), body.action, body.what)
        await self._accounts.store.saved()
        return json_response({"object": "audit.entry", "action": body.action}, 201)

    async def feedback(self, request: Request) -> Response:
        since, limit = _since(request, "7d", time.time()), _number(request, "limit", 100)
        found = await self._accounts.store.read_latest(lambda connection: read_feedback(connection, since, limit))
        return json_response({"object": "list", "data": found})

    async def content(self, request: Request) -> Response:
        id, limit = _key_id(request), _number(request, "limit", 100)
        self._accounts.audit(actor_of(request), "content.read", {"key": id})
        found = await self._accounts.store.read_latest(lambda connection: stored(connection, id, limit))
        return json_response({"object": "list", "data": found})

    async def forget(self, request: Request) -> Response:
        id = _key_id(request)
        self._accounts.content.forget(id)
        self._accounts.responses.forget(id)
        self._accounts.audit(actor_of(request), "content.delete", {"key": id})
        await self._accounts.store.saved()
        return json_response({"object": "content.deleted", "key": id})

    async def give_feedback(self, request: Request) -> Response:
        body = await read_json(request, FeedbackBody, MAX_BODY_BYTES)
        key: Key | None = request.state.key
        tenant = key.id if key else ANONYMOUS
        await self._accounts.feedback.note(tenant, body.request_id, body.score, body.comment)
        return json_response({"object": "feedback", "request_id": body.request_id, "score": body.score}, 201)


def _key_id(request: Request) -> str:
    id = request.query_params.get("key", "")
    if not id:
        raise InvalidRequest("'key' is missing: the id of a key, or 'anonymous'.", param="key")
    return id


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise InvalidRequest(f"'{name}' must be a whole number of 0 or more.", param=name)
    return min(int(text), _MAX_ROWS) if name == "limit" else int(text)


def _since(request: Request, default: str, now: float) -> float:
    """'24h' ago, or seconds since 1970."""
    text = request.query_params.get("since", default)
    if match := _SPAN.fullmatch(text):
        return now - float(match[1]) * _UNITS[match[2]]
    try:
        at = float(text)
    except ValueError:
        at = math.nan
    if not 0 <= at <= now:
        raise InvalidRequest(
            "'since' must be a span such as 24h, 30m or 7d, or a time in the past in seconds since 1970.", param="since"
        )
    return at
