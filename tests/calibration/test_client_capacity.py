"""The client's ceiling: how it is judged from levels, and that it is measured, kept and read back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from powerband.calibration.client_capacity import (
    ClientCapacity,
    RateRamp,
    RateStep,
    judge,
    known_client_capacity,
    measure_client_capacity,
)
from powerband.errors import EnvironmentFault


def level(chunks: int, cpu_s: float, client_ms: float = 0.2, server_ms: float = 0.1) -> RateStep:
    return RateStep(
        seconds=1.0, chunks=chunks, cpu_s=cpu_s, client_late_s=client_ms / 1000, server_late_s=server_ms / 1000
    )


def test_a_client_that_falls_behind_sets_its_own_ceiling() -> None:
    found = judge([level(10_000, 0.2), level(20_000, 0.4), level(26_000, 0.9, client_ms=12)], 900.0)
    assert found == ClientCapacity(chunks_per_s=26_000, requests_per_s=900, cpu_us_per_chunk=20.0, limited_by="client")


def test_a_hiccup_of_the_machine_ends_nothing() -> None:
    found = judge([level(10_000, 0.2), level(20_000, 0.4, client_ms=9), level(30_000, 0.6)], 1.0)
    assert (found.limited_by, found.cpu_us_per_chunk) == ("levels", 20.0)


def test_a_whole_core_is_a_ceiling() -> None:
    assert judge([level(10_000, 0.2), level(40_000, 0.99)], 1.0).limited_by == "client"


def test_a_server_that_falls_behind_does_not() -> None:
    """Then the client's CPU time says what it could do."""
    found = judge([level(10_000, 0.2), level(20_000, 0.5, client_ms=20, server_ms=30)], 1.0)
    assert (found.limited_by, found.chunks_per_s) == ("server", 50_000)


def test_where_both_follow_to_the_end_the_cpu_says() -> None:
    found = judge([level(10_000, 0.2), level(20_000, 0.3)], 1.0)
    assert (found.limited_by, found.chunks_per_s) == ("levels", pytest.approx(20_000 / 0.3))


@pytest.mark.parametrize("levels", [[], [level(100, 0.1, client_ms=50)]])
def test_a_client_that_is_late_at_once_has_none(levels: list[RateStep]) -> None:
    with pytest.raises(EnvironmentFault, match="late even under little load"):
        judge(levels, 1.0)


def test_it_is_measured_kept_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERBAND_CACHE", str(tmp_path))
    assert known_client_capacity() is None
    found = None
    for _ in range(3):  # on a machine that does much else it may be late
        try:
            found = asyncio.run(
                measure_client_capacity(RateRamp(max_streams=40, levels=2, level_s=2.0), requests_s=0.5)
            )
            break
        except EnvironmentFault:
            continue
    assert found is not None
    assert 1 < found.cpu_us_per_chunk < 1000
    assert found.chunks_per_s > 1000
    assert found.requests_per_s > 100
    assert known_client_capacity() == found
    (kept,) = tmp_path.rglob("*.json")
    kept.write_text("{}")
    assert known_client_capacity() is None
