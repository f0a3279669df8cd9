"""What a replica is sent for a client's body."""

from __future__ import annotations

import json
from typing import Any

import pytest

from powerband.gateway.proxy.intake import Intake
from powerband.gateway.request import ANONYMOUS
from powerband.gateway.routes import ReplicaAddress
from powerband.spec.deployment import EngineName

BODY = {"model": "demo", "prompt": "hello", "seed": 7, "an_extra": {"deep": [1.50, None]}}


def sent(body: dict[str, Any], tenant: str = ANONYMOUS, engine: EngineName = "powerband") -> dict[str, Any]:
    replica = ReplicaAddress(id="r1", url="http://127.0.0.1:1", model="demo", engine=engine)
    found: dict[str, Any] = json.loads(Intake(json.dumps(body).encode(), "completions").body_for(replica, tenant))
    return found


def test_what_needs_no_change_is_passed_on_as_it_came() -> None:
    data = json.dumps(BODY, indent=3).encode()
    replica = ReplicaAddress(id="r1", url="http://127.0.0.1:1", model="demo")
    assert Intake(data, "completions").body_for(replica, ANONYMOUS) == data


@pytest.mark.parametrize(("engine", "name"), [("powerband", "user"), ("vllm", "cache_salt")])
def test_keys_share_no_cached_prefix(engine: EngineName, name: str) -> None:
    said = {sent(body, tenant, engine)[name] for body in (BODY, {**BODY, name: "me"}) for tenant in ("key_a", "key_b")}
    assert said == {"key_a", "key_b", "key_a/me", "key_b/me"}
    assert sent({**BODY, name: "key_a"}, engine=engine)[name] == "anonymous/key_a"
    assert len(sent({**BODY, name: "x" * 512}, "key_a", engine)[name]) == (512 if name == "user" else 518)


def test_a_stream_is_asked_for_what_going_on_elsewhere_needs() -> None:
    body = sent({**BODY, "stream": True})
    assert body["return_token_ids"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["an_extra"] == BODY["an_extra"]


def test_a_replica_that_goes_on_is_told_what_the_client_has() -> None:
    replica = ReplicaAddress(id="r1", url="http://127.0.0.1:1", model="demo")
    intake = Intake(json.dumps({**BODY, "stream": True, "echo": True}).encode(), "completions")
    body = json.loads(intake.body_for(replica, ANONYMOUS, [3, 1, 4]))
    assert body["resume_token_ids"] == [3, 1, 4]
    assert "echo" not in body, "the prompt was echoed by the replica before"
