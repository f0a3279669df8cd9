"""What clients entrust to a gateway is in no log, no message and no file of it: keys, prompts, outputs."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import httpx
from gateways_for_tests import gateway_before, until

from powerband.bench.client.prompts import WORDS
from powerband.gateway.accounts.accounts import Accounts
from powerband.mock_server.behavior import Behavior

PHRASE = "the-unforgettable-phrase"
COMMENT = "the-unforgettable-comment"


def test_no_key_and_no_prompt_leaves_a_trace(tmp_path: Path) -> None:
    scripts = (
        Behavior(fail_every=3, tpot_s=0.002, drop_every=2),
        Behavior(tpot_s=0.002, drop_every=3, drop_by="garbage"),
    )
    flags = ("--log-level=debug", "--log-format=json", "--auth=keys")
    with gateway_before(tmp_path, *scripts, arguments=flags) as gateway:
        secrets = []
        for name, limits in (("app", {}), ("limited", {"requests_per_min": 1, "tokens_per_min": 50})):
            made = gateway.admin.post("/admin/keys", json={"name": name, "limits": limits}).json()
            secrets.append(made["secret"])
        secrets += ["pb-made-up-but-secret", gateway.admin.headers["authorization"].removeprefix("Bearer ")]
        answers = []
        for secret in secrets:
            http = httpx.Client(base_url=gateway.url, headers={"Authorization": f"Bearer {secret}"}, timeout=30)
            bodies: tuple[dict[str, object], ...] = (
                {"prompt": PHRASE, "max_tokens": 20},
                {"prompt": PHRASE, "max_tokens": 20, "stream": True},
                {"prompt": PHRASE, "max_tokens": 10**6},
                {"prompt": {"wrong": PHRASE}},
                {"prompt": PHRASE, "max_tokens": PHRASE},
                {"prompt": PHRASE, "deadline_s": 1e-9},
            )
            answers += [http.post("/v1/completions", json={"model": "scripted", **body}) for body in bodies]
            answers.append(http.post("/v1/completions", content=f'{{"prompt": "{PHRASE}'.encode()))
            id = answers[-7].headers["x-request-id"]
            http.post("/v1/feedback", json={"request_id": id, "score": 1, "comment": COMMENT})
        until(lambda: gateway.admin.get("/admin/usage").json()["books"]["usage_waiting"] == 0)
    assert {answer.status_code for answer in answers} >= {200, 400, 401, 429}
    said = "".join(answer.text + str(answer.headers) for answer in answers)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert {"gateway.db", "gateway.log", "routes.json"} <= set(files)
    for secret in secrets:
        assert secret not in said
        assert [name for name, data in files.items() if secret.encode() in data] == []
    assert [name for name, data in files.items() if PHRASE.encode() in data] == []
    assert COMMENT.encode() not in files["gateway.log"]
    output = " ".join(WORDS[:6]).encode()
    assert [name for name, data in files.items() if output in data] == []


def test_a_copy_made_while_it_runs_is_whole(tmp_path: Path) -> None:
    """As docs/operating.md has it: SQLite's own backup, from another process or this one."""
    accounts = Accounts.open(tmp_path / "gateway.db")
    key, secret = accounts.keys.create("app")
    for number in range(50):
        accounts.audit("somebody", "test", {"number": number})
    accounts.store.flush().result(10)
    with sqlite3.connect(tmp_path / "gateway.db") as source, sqlite3.connect(tmp_path / "copy.db") as copy:
        source.backup(copy)
    accounts.audit("somebody", "after the copy", {})
    accounts.close()
    restored = Accounts.open(tmp_path / "copy.db")
    assert restored.keys.authenticate([b"Bearer " + secret.encode()]) == key
    restored.close()
