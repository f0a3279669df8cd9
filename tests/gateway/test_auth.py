"""Which key opens which path; and that a path which the table does not name is closed to all but administrators."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router

from powerband.errors import InvalidRequest
from powerband.gateway.accounts.accounts import Accounts
from powerband.gateway.accounts.auth import ApiKeyMiddleware, Auth
from powerband.gateway.accounts.keys import KeyLimits
from powerband.gateway.request import GatewayRequest
from powerband.web.middleware import RequestIdMiddleware

PATHS = ("/livez", "/metrics", "/v1/models", "/v1/models/a/b", "/v1/chat/completions", "/v1/new", "/new", "/admin/keys")


@pytest.fixture
def accounts(tmp_path: Path) -> Iterator[Accounts]:
    opened = Accounts.open(tmp_path / "gateway.db")
    yield opened
    opened.close()


def app_of(accounts: Accounts, auth: Auth) -> RequestIdMiddleware:
    async def answer(request: Request) -> Response:
        key = request.state.key
        asked = GatewayRequest(id="r", endpoint="chat", model="demo", prompt_tokens=10)
        if request.url.path == "/v1/invalid":
            raise InvalidRequest("No.")
        if request.url.path == "/v1/completions":
            accounts.limits.reserve(key, asked).settle(10, 0, 0.0)
        return PlainTextResponse(key.name if key else "nobody")

    paths = (*PATHS, "/v1/completions", "/v1/invalid")
    return RequestIdMiddleware(
        ApiKeyMiddleware(Router([Route(path, answer) for path in paths]), accounts, auth, "127.0.0.1")
    )


def ask(
    app: Any, *paths: str, secret: str = "", host: str = "localhost", scheme: str = "Bearer"
) -> list[httpx.Response]:
    headers = {"authorization": f"{scheme} {secret}"} if secret else {}

    async def scenario() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{host}") as client:
            return [await client.get(path, headers=headers) for path in paths]

    return asyncio.run(scenario())


def statuses(app: Any, secret: str = "") -> dict[str, int]:
    return dict(zip(PATHS, [answer.status_code for answer in ask(app, *PATHS, secret=secret)], strict=True))


def test_with_keys_every_path_asks_for_its_scope(accounts: Accounts) -> None:
    app = app_of(accounts, "keys")
    secrets = {scope: accounts.keys.create(scope, [scope])[1] for scope in ("infer", "metrics", "admin")}
    assert statuses(app) == {path: 200 if path == "/livez" else 401 for path in PATHS}
    opened = {
        scope: {p for p, status in statuses(app, secret).items() if status == 200} for scope, secret in secrets.items()
    }
    assert opened["infer"] == {"/livez", "/v1/models", "/v1/models/a/b", "/v1/chat/completions"}
    assert opened["metrics"] == {"/livez", "/metrics"}
    assert opened["admin"] == {"/livez", "/v1/new", "/new", "/admin/keys"}
    refused = ask(app, "/admin/keys", secret=secrets["infer"])[0]
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "scope_missing")


def test_an_open_gateway_asks_for_keys_only_behind_its_table(accounts: Accounts) -> None:
    app = app_of(accounts, "open")
    closed = {"/v1/new", "/new", "/admin/keys"}
    assert statuses(app) == {path: 401 if path in closed else 200 for path in PATHS}
    assert statuses(app, "EMPTY") == statuses(app)  # clients whose library wants some key
    _, secret = accounts.keys.create("app")
    assert ask(app, "/v1/models", secret=secret)[0].text == "app"
    assert ask(app, "/v1/models", secret="pb-made-up")[0].status_code == 401


def test_an_open_gateway_answers_to_names_of_this_machine_only(accounts: Accounts) -> None:
    app = app_of(accounts, "open")
    assert ask(app, "/v1/models", host="evil.example")[0].json()["error"]["code"] == "host_not_allowed"
    assert ask(app, "/v1/models", host="10.0.0.7:8000")[0].status_code == 200
    _, secret = accounts.keys.create("app")
    assert ask(app, "/v1/models", host="llm.example", secret=secret)[0].status_code == 200


@pytest.mark.parametrize(
    "path", ["//admin/keys", "/admin//keys", "/ADMIN/keys", "/livez/", "/livez/../admin/keys", "/v1/models%2f..%2fnew"]
)
def test_odd_paths_open_nothing(accounts: Accounts, path: str) -> None:
    app = app_of(accounts, "open")
    assert ask(app, path)[0].status_code in (401, 404)


def test_answers_carry_what_is_left_and_refusals_when_to_come_back(accounts: Accounts) -> None:
    app = app_of(accounts, "keys")
    _, secret = accounts.keys.create("app", limits=KeyLimits(requests_per_min=2, tokens_per_min=1000))
    first, second, third = ask(app, "/v1/completions", "/v1/completions", "/v1/completions", secret=secret)
    assert (first.status_code, second.status_code, third.status_code) == (200, 200, 429)
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in (first, second, third)] == ["1", "0", "0"]
    assert third.headers["x-ratelimit-remaining-tokens"] == "980"
    assert third.json()["error"]["code"] == "requests_limit"
    assert third.json()["error"]["type"] == "rate_limit_error"
    assert 59 <= int(third.headers["retry-after"]) <= 61


def test_errors_carry_what_is_left(accounts: Accounts) -> None:
    app = app_of(accounts, "keys")
    _, secret = accounts.keys.create(
        "app", ("infer", "admin"), limits=KeyLimits(requests_per_min=2, tokens_per_min=1000)
    )
    invalid, missing = ask(app, "/v1/invalid", "/v1/there-is-none", secret=secret)
    assert (invalid.status_code, missing.status_code) == (400, 404)
    for answer in (invalid, missing):
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        assert answer.headers["x-ratelimit-remaining-tokens"] == "1000"
        assert "x-request-id" in answer.headers


def test_what_never_fits_again_has_no_time_to_come_back(accounts: Accounts) -> None:
    _, secret = accounts.keys.create("app", limits=KeyLimits(usd=0.0, usd_period="total", requests_per_min=9))
    refused = ask(app_of(accounts, "keys"), "/v1/completions", secret=secret)[0]
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "spend_limit")
    assert "retry-after" not in refused.headers


def test_no_key_is_in_a_message_or_a_log(accounts: Accounts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    key, secret = accounts.keys.create("app")
    accounts.keys.revoke(key.id)
    made_up = "pb-made-up-but-secret"
    app = app_of(accounts, "keys")
    for sent in (secret, made_up):
        for answer in ask(app, *PATHS, secret=sent):
            assert sent not in answer.text
            assert sent not in str(answer.headers)
        assert sent not in caplog.text
