"""The audit's chain shows what was changed in it, what was cut off it, and that all of it is gone."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path

import pytest

from powerband.gateway.accounts.accounts import Accounts
from powerband.gateway.accounts.audit import entries, head_path, read_head, verify_chain


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Books with five entries."""
    accounts = Accounts.open(tmp_path / "gateway.db")
    for number in range(5):
        accounts.audit("root", f"act {number}", {"number": number})
    accounts.close()
    return tmp_path / "gateway.db"


def change(path: Path, sql: str, *values: object) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(sql, values)
    connection.close()


def broken_at(path: Path) -> int | None:
    accounts = Accounts.open(path)
    try:
        return accounts.store.read(lambda connection: verify_chain(entries(connection), accounts.audit_head))
    finally:
        accounts.close()


def test_a_chain_that_nobody_touched_is_whole(path: Path) -> None:
    head = read_head(head_path(path))
    assert head is not None
    assert (head.seq, head_path(path).stat().st_mode & 0o777) == (5, 0o600)
    assert broken_at(path) is None


@pytest.mark.parametrize("column", ["at", "actor", "action", "what", "hash"])
def test_any_change_shows(path: Path, column: str) -> None:
    value = {"at": math.nextafter(at_of(path, 3), math.inf)}.get(column, "x")
    change(path, f"UPDATE audit SET {column} = ? WHERE seq = 3", value)  # noqa: S608 (a constant)
    assert broken_at(path) == 3


def at_of(path: Path, seq: int) -> float:
    with sqlite3.connect(path) as connection:
        found: float = connection.execute("SELECT at FROM audit WHERE seq = ?", (seq,)).fetchone()[0]
    connection.close()
    return found


def test_a_value_of_another_kind_shows(path: Path) -> None:
    change(path, "UPDATE audit SET what = CAST(what AS BLOB) WHERE seq = 2")
    assert broken_at(path) == 2


@pytest.mark.parametrize(("kept", "broken"), [(4, 5), (2, 3), (0, 1)])
def test_what_is_cut_off_shows_and_goes_on_showing(path: Path, kept: int, broken: int) -> None:
    change(path, "DELETE FROM audit WHERE seq > ?", kept)
    assert broken_at(path) == broken
    accounts = Accounts.open(path)
    accounts.audit("root", "later", {})
    accounts.close()
    assert broken_at(path) == broken


def test_a_new_chain_in_place_of_the_old_one_shows(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    accounts = Accounts.open(other / "gateway.db")
    for number in range(5):
        accounts.audit("root", f"another {number}", {})
    accounts.close()
    change(path, "DELETE FROM audit")
    with sqlite3.connect(path) as connection:
        connection.execute("ATTACH ? AS other", (str(other / "gateway.db"),))
        connection.execute("INSERT INTO audit SELECT * FROM other.audit")
    connection.close()
    assert broken_at(path) == 5


def test_books_from_before_there_was_a_head_get_one_and_say_so(path: Path) -> None:
    head_path(path).unlink()
    assert broken_at(path) is None
    accounts = Accounts.open(path)
    last = accounts.store.read(lambda connection: entries(connection))[-1]
    accounts.close()
    assert (last.seq, last.actor, last.action) == (6, "powerband", "audit.head")
    head = read_head(head_path(path))
    assert head is not None
    assert head.seq == 6


def test_entries_that_are_cut_off_while_the_gateway_runs_show(tmp_path: Path) -> None:
    accounts = Accounts.open(tmp_path / "gateway.db")
    for number in range(3):
        accounts.audit("root", f"act {number}", {})
    accounts.store.flush().result(5)
    change(tmp_path / "gateway.db", "DELETE FROM audit WHERE seq = 3")
    assert accounts.store.read(lambda connection: verify_chain(entries(connection), accounts.audit_head)) == 3
    accounts.close()
