"""Keys, usage and audit from the command line, against a gateway that runs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateways_for_tests import RunningGateway, gateway_before, until

from powerband.cli.main import main
from powerband.gateway.accounts.accounts import Accounts
from powerband.metrics.logging import set_up_logging
from powerband.mock_server.behavior import Behavior

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with gateway_before(tmp_path_factory.mktemp("gateway"), Behavior()) as running:
        yield running


@pytest.fixture
def flags(gateway: RunningGateway, tmp_path: Path) -> list[str]:
    file = tmp_path / "admin.key"
    file.write_text(gateway.admin.headers["authorization"].removeprefix("Bearer "))
    return ["--url", gateway.url, "--admin-key-file", str(file)]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(arguments)
    return code, capsys.readouterr().err


def test_a_key_is_made_used_limited_and_revoked(
    gateway: RunningGateway, flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    secret = run(capsys, "keys", "create", "app", "--requests-per-min", "5", "--expires", "2d", *flags).strip()
    headers = {"Authorization": f"Bearer {secret}"}
    model = gateway.http.get("/v1/models").json()["data"][0]["id"]
    answer = gateway.http.post("/v1/chat/completions", json={**CHAT, "model": model}, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-remaining-requests"] == "4"
    line = next(line for line in run(capsys, "keys", "list", *flags).splitlines() if "app" in line)
    assert "1 of 5" in line
    assert secret not in line

    run(capsys, "keys", "limit", "app", "--lift", "requests_per_min", "--usd", "1.5", *flags)
    changed = json.loads(run(capsys, "keys", "list", "--json", *flags))[-1]
    assert (changed["limits"]["requests_per_min"], changed["limits"]["usd"]) == (None, 1.5)

    row = {}

    def is_written() -> bool:
        rows = json.loads(run(capsys, "usage", "--by", "key", "--json", *flags))["data"]
        row.update(next((one for one in rows if one["key_name"] == "app"), {}))
        return bool(row)

    until(is_written)
    assert (row["requests"], row["output_tokens"]) == (1, answer.json()["usage"]["completion_tokens"])
    file = tmp_path / "usage.csv"
    run(capsys, "usage", "--csv", str(file), *flags)
    assert run(capsys, "usage", "--csv", "-", *flags) == file.read_text()
    assert [one["requests"] for one in csv.DictReader(file.open()) if one["key_name"] == "app"] == ["1"]
    assert "total" in run(capsys, "usage", "--by", "model,day", "--since", "30d", *flags)

    run(capsys, "keys", "revoke", "app", *flags)
    assert gateway.http.get("/v1/models", headers=headers).json()["error"]["code"] == "revoked_api_key"
    told = run(capsys, "audit", *flags)
    assert [action for action in ("keys.create", "keys.limit", "keys.revoke") if action in told] == [
        "keys.create",
        "keys.limit",
        "keys.revoke",
    ]


def test_mistakes_are_named(flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = flags[:2]
    for arguments, code, message in (
        (["keys", "revoke", "nobody", *flags], 2, "There is no key 'nobody'"),
        (["keys", "create", "a", "--scopes", "root", *flags], 2, "'root'; known are infer, metrics, admin"),
        (["keys", "create", "a", "--expires", "soon", *flags], 2, "such as 90d"),
        (["keys", "limit", "a", *flags], 2, "No limit is given"),
        (
            ["keys", "create", "a", "--requests-per-min", "-3", *flags],
            2,
            "--requests-per-min is -3; it must be between 1",
        ),
        (["keys", "limit", "a", "--max-concurrency", "0", *flags], 2, "--max-concurrency is 0; it must be between 1"),
        (["keys", "limit", "a", "--usd", "-1", *flags], 2, "--usd is -1.0; it must be between 0"),
        (["keys", "limit", "a", "--priority", "5000", *flags], 2, "--priority is 5000; it must be between -1000 and"),
        (["keys", "limit", "a", "--lift", "rpm", *flags], 2, "known are requests_per_min"),
        (["usage", "--by", "secret", *flags], 2, "known are key, model, day"),
        (["usage", "--since", "yesterday", *flags], 2, "such as 24h"),
        (["usage", *url, "--admin-key-file", str(tmp_path / "none")], 3, "none: No such file or directory."),
        (["usage", "--url", "http://127.0.0.1:9", *flags[2:]], 3, "No gateway at http://127.0.0.1:9"),
        (["usage", "--url", "nowhere", *flags[2:]], 2, "Invalid URL"),
    ):
        found, told = complaint(capsys, *arguments)
        assert (found, message in told) == (code, True), told


def test_a_wrong_admin_key_is_not_repeated(
    flags: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "wrong.key"
    file.write_text("pb-wrong-but-secret")
    code, told = complaint(capsys, "keys", "list", *flags[:2], "--admin-key-file", str(file))
    assert (code, "The API key is wrong" in told, "pb-wrong" in told) == (2, True, False)


def test_without_a_deployed_service_the_commands_say_what_to_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POWERBAND_STATE", str(tmp_path))
    code, told = complaint(capsys, "usage")
    assert (code, "No service is deployed" in told, "--url" in told) == (3, True, True)


def test_a_second_key_of_a_name_is_only_created_when_it_is_meant(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "keys", "create", "app", *flags)
    code, said = complaint(capsys, "keys", "create", "app", *flags)
    assert (code, "There is a key called 'app' already" in said) == (2, True)
    run(capsys, "keys", "create", "app", "--force", *flags)
    code, said = complaint(capsys, "keys", "revoke", "app", *flags)
    assert (code, "Several keys are called 'app'" in said, "by its id" in said) == (2, True, True)
    for key in json.loads(run(capsys, "keys", "list", "--json", *flags)):
        if key["name"] == "app":
            run(capsys, "keys", "revoke", key["id"], *flags)
    code, said = complaint(capsys, "keys", "revoke", "app", *flags)
    assert (code, "The key 'app' was revoked already" in said) == (2, True)
    run(capsys, "keys", "create", "app", *flags)  # the name is free again


def test_books_that_nobody_can_administer_get_a_key_for_this_user(tmp_path: Path) -> None:
    accounts, file = Accounts.open(tmp_path / "gateway.db"), tmp_path / "admin.key"
    try:
        assert not accounts.keys.admins()
        accounts.make_admin_key(file, "first")
        (key,) = accounts.keys.admins()
        assert file.stat().st_mode & 0o077 == 0
        assert accounts.keys.authenticate([b"Bearer " + file.read_bytes().strip()]) == key
        accounts.keys.revoke(key.id)
        assert not accounts.keys.admins()
        accounts.make_admin_key(file, "another")
        assert accounts.keys.authenticate([b"Bearer " + file.read_bytes().strip()]) != key
    finally:
        accounts.close()


def test_no_text_that_somebody_sent_makes_a_second_log_line() -> None:
    stream = io.StringIO()
    logger = set_up_logging("info", "text", stream)
    logger.info("audit 1: %s by %s", "note\n12:00:00.000 INFO    gateway: forged", "\x1b[2Jroot\r\u2028\x85")
    try:
        raise ValueError("a\n12:00:00.000 INFO    gateway: forged")
    except ValueError:
        logger.exception("failed")
    lines = stream.getvalue().splitlines()
    assert sum(not line.startswith("  | ") for line in lines) == 2
    assert "\\n12:00:00.000" in lines[0]
    assert "\x1b" not in stream.getvalue()
