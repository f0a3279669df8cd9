"""Usage reaches the disk without anyone waiting, once and only once, through full disks, locks and restarts."""

from __future__ import annotations

import functools
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateways_for_tests import gateway_before

from powerband.errors import InvalidRequest
from powerband.gateway.accounts.accounts import Accounts
from powerband.gateway.accounts.usage import UsageRow, report
from powerband.gateway.accounts.usage_log import UsageLog
from powerband.gateway.options import RetentionOptions
from powerband.gateway.request import CompletedRequest, GatewayRequest
from powerband.metrics.record import Outcome, RequestRecord
from powerband.mock_server.behavior import Behavior

DAY_S = 86400


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gateway.db"


@pytest.fixture
def accounts(path: Path) -> Iterator[Accounts]:
    opened = Accounts.open(path)
    yield opened
    opened.close()


def finished(
    id: str, *, tenant: str = "key_1", model: str = "demo", ago_s: float = 0.0, ttft_s: float = 0.1, **values: Any
) -> CompletedRequest:
    outcome = values.pop("outcome", Outcome.OK)
    request = GatewayRequest(id=id, endpoint="chat", model=model, tenant=tenant)
    record = RequestRecord(
        scheduled_s=5.0,
        sent_s=5.0,
        chunk_times_s=(5.0 + ttft_s,),
        chunk_tokens=(7,),
        outcome=outcome,
        prompt_tokens=100,
        cached_tokens=40,
        output_tokens=7,
    )
    status = 200 if outcome is Outcome.OK else 502
    return CompletedRequest(
        request=request,
        record=record,
        status=status,
        ended_at=time.time() - ago_s,
        replicas=("r1",),
        cost_usd=values.pop("cost_usd", 0.25),
        reasoning_tokens=values.pop("reasoning_tokens", None),
    )


def written(accounts: Accounts) -> None:
    accounts.store.flush().result(60)


def rows(accounts: Accounts, by: tuple[str, ...] = (), ago_s: float = 3600) -> list[UsageRow]:
    now = time.time()
    return accounts.store.read(lambda connection: report(connection, by, now - ago_s, now))


def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_s, "it never came true"
        time.sleep(0.01)


def test_rows_are_summed_by_what_is_asked(accounts: Accounts) -> None:
    for index in range(3):
        accounts.usage_log.note(finished(f"a{index}"))
    accounts.usage_log.note(finished("b", tenant="key_2", outcome=Outcome.ERROR, cost_usd=0.0))
    written(accounts)
    [everything] = rows(accounts)
    assert (everything.requests, everything.errors, everything.cost_usd) == (4, 1, 0.75)
    assert (everything.prompt_tokens, everything.cached_tokens, everything.output_tokens) == (400, 160, 28)
    assert [(row.key, row.requests) for row in rows(accounts, ("key",))] == [("key_1", 3), ("key_2", 1)]
    assert [(row.model, row.key) for row in rows(accounts, ("model", "key"))] == [("demo", "key_1"), ("demo", "key_2")]
    with pytest.raises(InvalidRequest, match="known are key, model, day"):
        rows(accounts, ("1; DROP TABLE usage",))


def test_latencies_are_numpys_percentiles(accounts: Accounts) -> None:
    samples = {
        model: np.random.default_rng(size).random(size).tolist() for model, size in (("a", 1), ("b", 2), ("c", 37))
    }
    for model, values in samples.items():
        for index, ttft_s in enumerate(values):
            accounts.usage_log.note(finished(f"{model}{index}", model=model, ttft_s=ttft_s))
    written(accounts)
    for row in rows(accounts, ("model",)):
        assert [row.ttft_p50_s, row.ttft_p95_s] == pytest.approx(np.percentile(samples[row.model], [50, 95]))


def test_the_same_request_is_billed_once(accounts: Accounts, path: Path) -> None:
    for _ in range(3):
        accounts.usage_log.note(finished("same"))
    accounts.close()
    again = Accounts.open(path)
    again.usage_log.note(finished("same"))
    written(again)
    assert (rows(again)[0].requests, rows(again, ago_s=30 * DAY_S)[0].cost_usd) == (1, 0.25)
    again.close()


def test_spend_survives_a_restart_and_retention(path: Path) -> None:
    accounts = Accounts.open(path)
    key, _ = accounts.keys.create("app")
    for index, ago_s in enumerate((0, 200 * DAY_S)):
        accounts.usage_log.note(finished(f"r{index}", tenant=key.id, ago_s=ago_s))
    accounts.close()
    again = Accounts.open(path, RetentionOptions(usage_retention_days=30))
    try:
        written(again)
        assert again.store.read(lambda c: c.execute("SELECT count(*) FROM usage").fetchone()) == (1,)
        assert rows(again, ago_s=300 * DAY_S)[0].requests == 2  # the sums of days outlive their requests
        assert again.limits.used(key)["usd"] == 0.25  # of this month
    finally:
        again.close()


def test_a_locked_file_delays_rows_and_loses_none(accounts: Accounts, path: Path) -> None:
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        for index in range(500):
            accounts.usage_log.note(finished(f"r{index}"))
        key, secret = accounts.keys.create("made meanwhile")
        assert accounts.keys.authenticate([f"Bearer {secret}".encode()]) == key
        eventually(lambda: accounts.figures().failing_s > 0)
        assert accounts.figures().usage_waiting == 500
        other.execute("ROLLBACK")
    written(accounts)
    assert accounts.figures().usage_written == rows(accounts)[0].requests == 500
    eventually(lambda: accounts.figures().failing_s == 0)


def test_a_full_disk_keeps_sums_when_it_can_keep_no_rows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(UsageLog, max_waiting=50)
    monkeypatch.setattr("powerband.gateway.accounts.accounts.UsageLog", small)
    accounts = Accounts.open(path)
    accounts.store.flush().result(60)
    full = threading.Event()
    full.set()
    real = accounts.store._execute

    def refuse(sql: str, values: Any) -> None:
        if full.is_set():
            raise sqlite3.OperationalError("database or disk is full")
        real(sql, values)

    monkeypatch.setattr(accounts.store, "_execute", refuse)
    for index in range(120):
        accounts.usage_log.note(finished(f"r{index}", tenant=f"key_{index % 2}"))
    figures = accounts.figures()
    assert (figures.usage_waiting, figures.usage_dropped) == (50, 70)
    eventually(lambda: accounts.figures().failing_s > 0)
    full.clear()
    written(accounts)
    assert accounts.store.read(lambda c: c.execute("SELECT count(*) FROM usage").fetchone()) == (
        52,
    )  # and a sum for each key
    [everything] = rows(accounts, ago_s=30 * DAY_S)
    assert (everything.requests, everything.cost_usd) == (120, 30.0)
    accounts.close()


def test_a_row_that_the_database_refuses_does_not_stop_the_others(accounts: Accounts) -> None:
    for id in ("good 1", "lone surrogate \ud800", "good 2"):
        accounts.usage_log.note(finished(id))
    written(accounts)
    assert (accounts.figures().usage_written, accounts.figures().usage_dropped) == (2, 1)


def test_noting_costs_the_event_loop_next_to_nothing(accounts: Accounts) -> None:
    made = [finished(f"r{index}") for index in range(2000)]
    start_s = time.thread_time()
    for one in made:
        accounts.usage_log.note(one)
    assert (time.thread_time() - start_s) / len(made) < 100e-6


def test_refusals_are_summed_and_fill_no_disk(accounts: Accounts) -> None:
    for index in range(1000):
        refused = finished(f"r{index}", outcome=Outcome.REFUSED, cost_usd=0.0)
        refused.replicas, refused.status, refused.error = (), 429, "requests_limit"
        accounts.usage_log.note(refused)
    accounts.usage_log.note(finished("left", outcome=Outcome.ABORTED))
    written(accounts)
    for ago_s in (60, 30 * DAY_S):
        [everything] = rows(accounts, ago_s=ago_s)
        assert (everything.requests, everything.refused, everything.errors) == (1001, 1000, 0)
    assert accounts.store.read(lambda c: c.execute("SELECT count(*) FROM usage").fetchone()[0]) < 100


def test_books_of_the_first_version_go_on(path: Path) -> None:
    with sqlite3.connect(path) as old:
        for sql in (
            "CREATE TABLE usage (id INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE, ended_at REAL, key_id TEXT, "
            "model TEXT, endpoint TEXT, prompt_tokens INTEGER, cached_tokens INTEGER, output_tokens INTEGER, "
            "queue_s REAL, ttft_s REAL, e2e_s REAL, status INTEGER, outcome TEXT, error TEXT, replica TEXT, "
            "cost_usd REAL)",
            "CREATE TABLE daily (day TEXT, key_id TEXT, model TEXT, requests INTEGER, errors INTEGER, "
            "prompt_tokens INTEGER, cached_tokens INTEGER, output_tokens INTEGER, cost_usd REAL, "
            "PRIMARY KEY (day, key_id, model)) WITHOUT ROWID",
            "INSERT INTO daily VALUES ('2026-11-01', 'key_1', 'demo', 5, 1, 10, 0, 10, 2.5)",
            "CREATE TRIGGER usage_to_daily AFTER INSERT ON usage BEGIN SELECT 1; END",
            "PRAGMA user_version = 1",
        ):
            old.execute(sql)
    accounts = Accounts.open(path)
    accounts.usage_log.note(finished("new"))
    written(accounts)
    now = time.time()
    [everything] = accounts.store.read(lambda connection: report(connection, (), 0.0, now))
    assert (everything.requests, everything.errors, everything.cost_usd) == (6, 1, 2.75)
    accounts.close()


def test_reasoning_tokens_are_summed_wherever_they_are_stored(accounts: Accounts) -> None:
    accounts.usage_log.note(finished("thinks", reasoning_tokens=5))
    accounts.usage_log.note(finished("does not say"))
    refused = finished("never sent", reasoning_tokens=2)
    refused.replicas = ()
    accounts.usage_log.note(refused)  # only counts in sums
    written(accounts)
    for ago_s in (60, 30 * DAY_S):  # from single requests; from the sums of days
        [everything] = rows(accounts, ago_s=ago_s)
        assert (everything.output_tokens, everything.reasoning_tokens) == (21, 7)


def test_a_database_that_counted_no_reasoning_goes_on(path: Path) -> None:
    accounts = Accounts.open(path)
    accounts.usage_log.note(finished("old", reasoning_tokens=9))
    written(accounts)
    accounts.close()
    with sqlite3.connect(path) as file:  # as version 3 left it
        file.execute("DROP TRIGGER usage_to_daily")
        for table in ("usage", "daily"):
            file.execute(f"ALTER TABLE {table} DROP COLUMN reasoning_tokens")
        file.execute("CREATE TRIGGER usage_to_daily AFTER INSERT ON usage BEGIN SELECT 1; END")
        file.execute("PRAGMA user_version = 3")
    accounts = Accounts.open(path)
    accounts.usage_log.note(finished("new", reasoning_tokens=5))
    written(accounts)
    [everything] = rows(accounts, ago_s=30 * DAY_S)
    assert (everything.requests, everything.output_tokens, everything.reasoning_tokens) == (2, 14, 5)
    accounts.close()


def test_a_sum_beyond_64_bits_does_not_end_the_report(accounts: Accounts) -> None:
    most = RequestRecord(scheduled_s=5.0, sent_s=5.0, outcome=Outcome.OK, prompt_tokens=2**63 - 1)
    for id in ("a", "b"):
        accounts.usage_log.note(replace(finished(id), record=most))
    written(accounts)
    assert rows(accounts)[0].prompt_tokens >= 2**63


def test_what_was_refused_just_before_is_in_the_report(tmp_path: Path) -> None:
    with gateway_before(tmp_path, Behavior()) as gateway:
        gateway.replicas[0].kill()
        for number in range(1, 4):
            asked = {"model": "scripted", "prompt": "a", "max_tokens": 1, "deadline_s": 0.2}
            assert gateway.post("/v1/completions", asked).status_code >= 500
            total = gateway.admin.get("/admin/usage").json()["total"]
            assert total["refused"] + total["errors"] == number
