"""API keys: shown once, useless on disk, refused alike when wrong, gone at once when revoked, there after a restart."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from powerband.errors import EnvironmentFault, InvalidRequest
from powerband.gateway.accounts.accounts import Accounts
from powerband.gateway.accounts.keys import Key, KeyLimits
from powerband.web.errors import HttpError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "gateway.db"


@pytest.fixture
def accounts(path: Path) -> Iterator[Accounts]:
    opened = Accounts.open(path)
    yield opened
    opened.close()


def bring(accounts: Accounts, secret: str) -> Key:
    return accounts.keys.authenticate([f"Bearer {secret}".encode()])


def refusal(accounts: Accounts, *values: bytes) -> str:
    with pytest.raises(HttpError) as caught:
        accounts.keys.authenticate(values)
    assert caught.value.http_status == 401
    return caught.value.code


def test_a_new_key_opens_and_is_nowhere_on_disk(accounts: Accounts, path: Path) -> None:
    key, secret = accounts.keys.create("app", ["infer", "metrics"])
    assert bring(accounts, secret) == key
    assert len(secret) == len("pb-") + 43  # 256 bits
    assert secret.startswith(key.prefix)
    accounts.close()
    for file in path.parent.iterdir():
        assert secret.encode() not in file.read_bytes()
        assert file.stat().st_mode & 0o077 == 0, file


def test_wrong_keys_are_all_refused_and_counted(accounts: Accounts) -> None:
    _, secret = accounts.keys.create("app")
    good = secret.encode()
    wrong = [
        b"Bearer",
        b"Bearer " + good[:-1],
        b"Bearer " + good + b"x",
        b"Basic " + good,
        good,
        b"Bearer " + good * 99,
    ]
    assert [refusal(accounts, value) for value in wrong] == ["invalid_api_key"] * len(wrong)
    assert refusal(accounts, b"Bearer " + good, b"Bearer " + good) == "invalid_api_key"
    assert refusal(accounts) == "missing_api_key"
    assert accounts.figures().keys_rejected == len(wrong) + 1


def test_near_misses_take_as_long_as_nonsense(accounts: Accounts) -> None:
    """The least of many batches, in turn, so that a busy machine does not matter."""
    _, secret = accounts.keys.create("app")
    kinds = [f"Bearer {text}".encode() for text in (secret[:-1] + "~", "pb-" + "x" * 43, secret[:20] + "y" * 26)]
    least_s = [float("inf")] * len(kinds)
    for _ in range(200):
        for number, value in enumerate(kinds):
            start_s = time.perf_counter()
            for _ in range(20):
                with contextlib.suppress(HttpError):
                    accounts.keys.authenticate([value])
            least_s[number] = min(least_s[number], time.perf_counter() - start_s)
    assert max(least_s) < 1.25 * min(least_s)


def test_a_revoked_key_opens_nothing_from_then_on(accounts: Accounts) -> None:
    key, secret = accounts.keys.create("app")
    other, other_secret = accounts.keys.create("other")
    accounts.keys.revoke(key.id)
    assert refusal(accounts, f"Bearer {secret}".encode()) == "revoked_api_key"
    assert bring(accounts, other_secret) == other


def test_a_key_expires(path: Path) -> None:
    now = 1_000_000.0
    opened = Accounts.open(path)
    accounts = Accounts(opened.store, opened.options, wall=lambda: now)
    _, secret = accounts.keys.create("app", expires_at=now + 60)
    bring(accounts, secret)
    now += 60
    assert refusal(accounts, f"Bearer {secret}".encode()) == "expired_api_key"
    opened.close()


def test_keys_and_limits_survive_a_restart(accounts: Accounts, path: Path) -> None:
    limits = KeyLimits(requests_per_min=60, usd=1.5, usd_period="total", models=("demo",), priority=2)
    key, secret = accounts.keys.create("app", limits=limits)
    changed = accounts.keys.limit(key.id, KeyLimits(tokens_per_min=1000, models=("demo",)))
    gone, _ = accounts.keys.create("gone")
    revoked = accounts.keys.revoke(gone.id)
    accounts.close()
    again = Accounts.open(path)
    try:
        assert again.keys.list() == (changed, revoked)
        assert bring(again, secret) == changed
    finally:
        again.close()


def test_two_gateways_do_not_share_a_file(accounts: Accounts, path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="in use"):
        Accounts.open(path)


def test_a_file_that_is_no_database_is_named(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(EnvironmentFault, match=r"Cannot open the gateway.s database .*gateway.db"):
        Accounts.open(path)


def test_books_of_a_newer_version_are_left_alone(path: Path) -> None:
    Accounts.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(EnvironmentFault, match="newer Powerband"):
        Accounts.open(path)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"name": " "}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "a", "scopes": []}, "'scopes' is empty"),
        ({"name": "a", "scopes": ["root"]}, "'root'; known are infer, metrics, admin"),
        ({"name": "a", "expires_at": 5.0}, "in the past"),
    ],
)
def test_nonsense_is_refused(accounts: Accounts, asked: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        accounts.keys.create(**asked)  # type: ignore[arg-type]  # that is the point
    assert accounts.keys.list() == ()


def test_limits_that_make_no_sense_are_refused() -> None:
    for wrong in (
        {"requests_per_min": 0},
        {"tokens_per_min": -1},
        {"usd": -0.1},
        {"usd": float("nan")},
        {"priority": 9999},
    ):
        with pytest.raises(InvalidRequest, match=next(iter(wrong))):
            KeyLimits(**wrong)  # type: ignore[arg-type]  # that is the point
