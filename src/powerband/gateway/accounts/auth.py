"""Authentication of every request. A new route needs an admin key until this table opens it.

| setting auth | a path of INFER     | a path of METRICS    | a path of OPEN | any other       |
|--------------|---------------------|----------------------|----------------|-----------------|
| "open"       | anyone              | anyone               | anyone         | an admin's key  |
| "keys"       | a key for "infer"   | a key for "metrics"  | anyone         | an admin's key  |

In both modes, a gateway key that a client sends is checked and its limits apply. Clients whose library requires a key
may send any other text to an open gateway.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from powerband.gateway.accounts.accounts import Accounts
from powerband.gateway.accounts.keys import PREFIX, SCOPES, Key
from powerband.gateway.accounts.keys import Scope as KeyScope
from powerband.web.access import check_host, check_page
from powerband.web.anthropic import sent_keys
from powerband.web.errors import HttpError
from powerband.web.middleware import add_headers

Auth = Literal["open", "keys"]

OPEN = frozenset({"/livez", "/readyz", "/health"})
METRICS = frozenset({"/metrics", "/metrics/targets"})
METRICS_BELOW = ("/metrics/replicas/",)
# Requests to these count against limits, and their responses have the limits' headers.
COUNTED = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/tokenize",
        "/detokenize",
        "/v1/responses",
        "/v1/responses/input_tokens",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/v1/rerank",
        "/rerank",
        "/v2/rerank",
        "/v1/score",
        "/score",
        "/pooling",
        "/classify",
    }
)
INFER = COUNTED | {"/v1/feedback", "/v1/models", "/version", "/openapi.json"}
INFER_BELOW = ("/v1/models/", "/v1/responses/")


class ApiKeyMiddleware:
    """Sets `scope["state"]["key"]`: the Key that the request brought, or None.

    It checks `scope["path"]`, which routes are matched with, too: neither the Host header nor an absolute URL can make
    the two differ. Raises HttpError 401 and 403. host: the address that the gateway listens on; unless `any_host`, a
    request without a key must be addressed to it or to a name of this machine.
    """

    def __init__(
        self,
        app: ASGIApp,
        accounts: Accounts,
        auth: Auth,
        host: str,
        *,
        any_host: bool = False,
        origins: Collection[str] = (),
    ) -> None:
        """origins: of web pages that may send requests without a key."""
        self._app = app
        self._origins = origins
        self._accounts = accounts
        self._auth = auth
        self._host = host
        self._any_host = any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = self._admit(scope)
        scope.setdefault("state", {})["key"] = key
        if key is None or not _is_counted(scope["path"]) or not _rates(key):
            await self._app(scope, receive, send)
            return
        known = key

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self._limit_headers(known)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_limits)
        except Exception:  # whichever it is, its response has them, too
            add_headers(scope, self._limit_headers(known))
            raise

    def _limit_headers(self, key: Key) -> list[tuple[bytes, bytes]]:
        return [(name.encode(), value.encode()) for name, value in self._accounts.limits.headers(key).items()]

    def _admit(self, scope: Scope) -> Key | None:
        path = scope["path"]
        needed = needed_scope(path)
        if needed is None:
            return None
        sent = sent_keys(scope)
        if self._auth == "open" and needed != "admin" and not any(_is_gateway_key(value) for value in sent):
            if not self._any_host:
                check_host(scope, self._host)
                check_page(scope, self._origins)
            return None
        key = self._accounts.keys.authenticate(sent)
        if needed not in key.scopes:
            raise HttpError(
                403,
                "scope_missing",
                f"This needs a key with the scope '{needed}'.",
                hint=f"The scopes are {', '.join(SCOPES)}.",
            )
        return key


def needed_scope(path: str) -> KeyScope | None:
    """The scope that a path requires; None: no key."""
    if path in OPEN:
        return None
    if path in METRICS or path.startswith(METRICS_BELOW):
        return "metrics"
    if path in INFER or path.startswith(INFER_BELOW):
        return "infer"
    return "admin"


def _is_counted(path: str) -> bool:
    """Whether requests to this path count against limits and get their headers."""
    return path.startswith("/v1/") or path in COUNTED


def _is_gateway_key(value: bytes) -> bool:
    return value.partition(b" ")[2].strip().startswith(PREFIX.encode())


def _rates(key: Key) -> bool:
    return key.limits.requests_per_min is not None or key.limits.tokens_per_min is not None
