"""Faults are injected as they say, within their bounds, and a server that they hurt is seen to be hurt."""

from __future__ import annotations

import asyncio
import time

import pytest

from powerband.bench.client.messages import ServerAddress
from powerband.errors import UsageError
from powerband.fault_injection.corpus import malformed_requests
from powerband.fault_injection.faults import FAULTS, FaultResult, run_fault
from powerband.mock_server.behavior import Behavior
from powerband.mock_server.process import mock_server_process

SOUND = Behavior(ttft_s=0.005, tpot_s=0.002)


def inject(
    kind: str, script: Behavior = SOUND, *, seconds: float = 0.5, intensity: int = 4, patience_s: float = 30.0
) -> FaultResult:
    async def run() -> FaultResult:
        async with mock_server_process(script) as server:
            return await run_fault(
                kind, server.target, seconds=seconds, intensity=intensity, probe_patience_s=patience_s
            )

    return asyncio.run(run())


@pytest.mark.parametrize("kind", FAULTS)
def test_a_sound_server_survives_every_fault(kind: str) -> None:
    started_s = time.monotonic()
    result = inject(kind)

    assert result.kind == kind
    assert result.sent >= 4
    assert sum(result.answers.values()) == result.sent
    assert result.before.failed == result.during.failed == result.after.failed == 0
    assert result.during.sent >= 1
    assert result.still_answers
    assert result.server_errors == 0
    assert result.slowdown is not None
    assert time.monotonic() - started_s < 60  # no fault goes on for ever


def test_each_wrong_request_is_sent_and_refused() -> None:
    result = inject("malformed", seconds=4.0, intensity=8)

    corpus = malformed_requests(ServerAddress(base="http://127.0.0.1:1", endpoint="completions", model="scripted"))
    assert set(result.cases) == set(corpus)
    assert len(corpus) > 50
    taken = {name for name, answer in result.cases.items() if answer == "200"}
    unread = ("temperature", "n is", "stop is")  # what the script does not read it does not refuse
    assert [name for name in taken if not name.startswith(unread)] == []
    for name in ("no JSON", "no UTF-8", "objects, 100,000 deep", "HTTP: two lengths", "HTTP: a negative length"):
        assert result.cases[name] == "400"
    assert result.cases["HTTP: a header of 1 MiB"] == "431"


def test_bodies_that_are_too_large_are_refused_before_they_are_sent_whole() -> None:
    result = inject("oversized", intensity=2)
    assert set(result.answers) <= {"413", "reset", "cancelled"}
    assert result.answers["413"] > 0
    assert result.bytes_sent < result.sent * (32 << 20)


def test_clients_that_leave_get_what_they_came_for() -> None:
    result = inject("cancel-storm")
    assert set(result.answers) == {"cancelled"}
    assert result.sent > 20


def test_a_server_that_leaks_is_found_out() -> None:
    """The planted fault: slots of requests that were cancelled stay taken, so after a storm nobody is served."""
    leaking = Behavior(ttft_s=0.005, tpot_s=0.002, slots=8, leaks_slots=True)
    result = inject("cancel-storm", leaking, seconds=0.3, patience_s=1.0)
    assert result.before.failed == 0
    assert not result.still_answers
    assert result.after.failed == result.after.sent


def test_others_who_are_hurt_are_seen() -> None:
    """Slow streams hold all slots of a small server: probes wait."""
    small = Behavior(ttft_s=0.005, tpot_s=0.0005, slots=2)
    result = inject("slow-readers", small, seconds=1.0, intensity=6, patience_s=1.0)
    assert result.during.failed or (result.during.worst_s or 0.0) > 0.1 > 5 * (result.before.median_s or 1.0)


def test_what_is_unbounded_or_elsewhere_is_refused() -> None:
    here = ServerAddress(base="http://127.0.0.1:1", endpoint="completions", model="m")

    def refused(kind: str, target: ServerAddress, seconds: float = 1.0, intensity: int = 1) -> str:
        with pytest.raises(UsageError) as problem:
            asyncio.run(run_fault(kind, target, seconds=seconds, intensity=intensity))
        return str(problem.value)

    assert "Unknown fault 'meteor'" in refused("meteor", here)
    assert "At most 1000 connections" in refused("malformed", here, intensity=100_000)
    assert "At most 1000 connections, and 600 s" in refused("malformed", here, seconds=1e9)
    far = ServerAddress(base="http://192.0.2.1:80", endpoint="completions", model="m")
    assert "192.0.2.1 is not here" in refused("malformed", far)
    assert "--allow-remote" in refused("malformed", far)
