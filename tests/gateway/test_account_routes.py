"""Administration over HTTP: keys from their making to their end, usage, audit, feedback, content; and who did what."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Router

from powerband.gateway.accounts.accounts import Accounts
from powerband.gateway.accounts.audit import entries, verify_chain
from powerband.gateway.accounts.auth import ApiKeyMiddleware
from powerband.gateway.accounts.routes import make_routes
from powerband.gateway.options import RetentionOptions
from powerband.gateway.request import CompletedRequest, GatewayRequest
from powerband.metrics.record import RequestRecord
from powerband.web.middleware import RequestIdMiddleware


class Service:
    """The routes behind authentication, called with an admin's key unless told otherwise."""

    def __init__(self, path: Path) -> None:
        self.accounts = Accounts.open(path, RetentionOptions(store_content=True))
        self.admin, self.secret = self.accounts.keys.create("root", ["admin"])
        self.app = RequestIdMiddleware(
            ApiKeyMiddleware(Router(make_routes(self.accounts)), self.accounts, "open", "127.0.0.1")
        )

    def ask(self, method: str, path: str, body: Any = None, secret: str | None = None) -> httpx.Response:
        async def scenario() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(self.app), base_url="http://localhost"
            ) as client:
                sent = self.secret if secret is None else secret
                headers = {"authorization": f"Bearer {sent}"} if sent else {}
                return await client.request(method, path, json=body, headers=headers)

        return asyncio.run(scenario())

    def finish(self, id: str, tenant: str) -> None:
        request = GatewayRequest(id=id, endpoint="chat", model="demo", tenant=tenant)
        record = RequestRecord(scheduled_s=0.0, sent_s=0.0, prompt_tokens=10, output_tokens=5)
        told = CompletedRequest(
            request=request, record=record, status=200, ended_at=time.time(), replicas=("r",), cost_usd=0.5
        )
        self.accounts.usage_log.note(told)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path / "gateway.db")
    yield made
    made.accounts.close()


def error_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_key_from_its_making_to_its_end(service: Service) -> None:
    made = service.ask("POST", "/admin/keys", {"name": "app", "limits": {"requests_per_min": 5, "models": ["demo"]}})
    assert (made.status_code, made.headers["cache-control"]) == (201, "no-store")
    key = made.json()
    secret = key.pop("secret")
    assert key["scopes"] == ["infer"]
    assert service.ask("GET", f"/admin/keys/{key['id']}").json() == key
    assert key["used"] == {"requests_last_min": 0, "tokens_last_min": 0, "running": 0, "usd": 0.0}
    assert error_of(service.ask("GET", "/admin/keys", secret=secret)) == (403, "scope_missing")

    patched = service.ask("PATCH", f"/admin/keys/{key['id']}", {"limits": {"requests_per_min": None, "usd": 2}}).json()
    assert (patched["limits"]["requests_per_min"], patched["limits"]["usd"]) == (None, 2)
    assert patched["limits"]["models"] == ["demo"]

    gone = service.ask("DELETE", f"/admin/keys/{key['id']}").json()
    assert gone["revoked_at"] > 0
    assert error_of(service.ask("GET", "/admin/keys", secret=secret)) == (401, "revoked_api_key")
    listed = service.ask("GET", "/admin/keys")
    assert [one["name"] for one in listed.json()["data"]] == ["root", "app"]
    assert secret not in listed.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a", "scopes": ["root"]}, "scopes"),
        ({"name": "a", "limits": {"requests_per_min": 0}}, "limits.requests_per_min"),
        ({"name": "a", "limits": {"rpm": 5}}, "limits.rpm"),
        ({"name": "a", "limits": {"usd_period": "week"}}, "limits.usd_period"),
        ({"name": "a", "expires_in_s": -1}, "expires_in_s"),
    ],
)
def test_nonsense_is_refused_with_its_field(service: Service, body: dict[str, Any], param: str) -> None:
    answer = service.ask("POST", "/admin/keys", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert len(service.accounts.keys.list()) == 1


def test_the_last_admin_key_stays(service: Service) -> None:
    assert error_of(service.ask("DELETE", f"/admin/keys/{service.admin.id}")) == (409, "last_admin_key")
    second = service.ask("POST", "/admin/keys", {"name": "second", "scopes": ["admin"]}).json()
    assert service.ask("DELETE", f"/admin/keys/{service.admin.id}", secret=second["secret"]).status_code == 200
    assert error_of(service.ask("GET", "/admin/keys/nobody", secret=second["secret"])) == (404, "key_not_found")


def test_every_admin_action_is_in_the_chain_and_tampering_shows(service: Service, tmp_path: Path) -> None:
    key = service.ask("POST", "/admin/keys", {"name": "app"}).json()
    service.ask("PATCH", f"/admin/keys/{key['id']}", {"limits": {"usd": 1}})
    service.ask("POST", "/admin/audit", {"action": "fleet.scale", "what": {"replicas": 3}})
    service.ask("DELETE", f"/admin/keys/{key['id']}")
    found = service.ask("GET", "/admin/audit?check=1")
    assert [entry["action"] for entry in found.json()["data"]] == [
        "keys.create",
        "keys.limit",
        "fleet.scale",
        "keys.revoke",
    ]
    assert {entry["actor"] for entry in found.json()["data"]} == {f"root ({service.admin.id})"}
    assert found.json()["broken_at"] is None
    assert key["secret"] not in found.text

    for sql in ("UPDATE audit SET actor = 'nobody' WHERE seq = 2", "DELETE FROM audit WHERE seq = 2"):
        with sqlite3.connect(service.accounts.store.path) as connection:
            connection.execute(sql)
            assert verify_chain(entries(connection)) == 2
            connection.rollback()
    assert len(service.ask("GET", "/admin/audit?after=2&limit=1").json()["data"]) == 1


def test_reports_show_what_was_done_just_before(service: Service) -> None:
    service.finish("r1", "anonymous")
    for count in range(1, 11):
        service.accounts.audit("root", "drain", {"replica": "a"})  # as the routes do that do not wait for the disk
        found = service.ask("GET", "/admin/audit?limit=1000").json()["data"]
        assert sum(entry["action"] == "drain" for entry in found) == count
        service.ask("POST", "/v1/feedback", {"request_id": "r1", "score": count / 10}, secret="")
        assert service.ask("GET", "/admin/feedback").json()["data"][0]["score"] == count / 10


def test_usage_names_keys_and_says_what_was_lost(service: Service) -> None:
    key = service.ask("POST", "/admin/keys", {"name": "app"}).json()
    for index in range(3):
        service.finish(f"r{index}", key["id"])
    service.accounts.store.flush().result(10)
    answer = service.ask("GET", "/admin/usage?by=key&since=1h").json()
    assert [(row["key_name"], row["requests"], row["cost_usd"]) for row in answer["data"]] == [("app", 3, 1.5)]
    assert answer["total"]["output_tokens"] == 15
    assert (answer["database"]["usage_dropped"], answer["database"]["failing_s"]) == (0, 0)
    for wrong in ("since=yesterday", "since=99999999999", "since=nan", "by=key,key", "by=secret"):
        assert service.ask("GET", f"/admin/usage?{wrong}").status_code == 400


def test_feedback_is_for_ones_own_requests(service: Service) -> None:
    app = service.ask("POST", "/admin/keys", {"name": "app"}).json()
    other = service.ask("POST", "/admin/keys", {"name": "other"}).json()
    service.finish("mine", app["id"])
    service.finish("open", "anonymous")
    feedback = {"request_id": "mine", "score": 1, "comment": "thanks, jane@example.com"}
    assert service.ask("POST", "/v1/feedback", feedback, secret=app["secret"]).status_code == 201
    assert error_of(service.ask("POST", "/v1/feedback", feedback, secret=other["secret"])) == (404, "request_not_found")
    assert error_of(service.ask("POST", "/v1/feedback", feedback, secret="")) == (404, "request_not_found")
    assert service.ask("POST", "/v1/feedback", {"request_id": "open", "score": -1}, secret="").status_code == 201
    service.accounts.store.flush().result(10)
    service.accounts.usage_log._recent.clear()  # as after a restart
    assert service.ask("POST", "/v1/feedback", feedback | {"score": 0.5}, secret=app["secret"]).status_code == 201
    for wrong in ({"score": 2}, {"score": "good"}, {"comment": "x" * 2001}):
        assert service.ask("POST", "/v1/feedback", feedback | wrong, secret=app["secret"]).status_code == 400
    service.accounts.store.flush().result(10)
    given = service.ask("GET", "/admin/feedback").json()["data"]
    assert {(one["request_id"], one["score"], one["comment"]) for one in given} == {
        ("mine", 0.5, "thanks, [e-mail]"),
        ("open", -1.0, ""),
    }
    assert [row["score"] for row in service.ask("GET", "/admin/usage?by=key").json()["data"]] == [-1.0, 0.5]


def test_content_is_shown_and_deleted_by_key(service: Service) -> None:
    service.accounts.content.note(
        GatewayRequest(id="r1", endpoint="chat", model="demo", tenant="key_1"), b'"hello"', ["hi"]
    )
    service.accounts.store.flush().result(10)
    assert [row["prompt"] for row in service.ask("GET", "/admin/content?key=key_1").json()["data"]] == ["hello"]
    assert service.ask("DELETE", "/admin/content").status_code == 400
    assert service.ask("DELETE", "/admin/content?key=key_1").status_code == 200
    assert service.ask("GET", "/admin/content?key=key_1").json()["data"] == []


def test_when_nothing_can_be_written_a_key_is_not_handed_out(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = service.accounts.store.saved
    monkeypatch.setattr(service.accounts.store, "saved", lambda: saved(0.2))
    with sqlite3.connect(service.accounts.store.path, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert error_of(service.ask("POST", "/admin/keys", {"name": "app"})) == (503, "store_unavailable")
        other.execute("ROLLBACK")
    assert [key.revoked_at is None for key in service.accounts.keys.list()] == [True, False]
