"""The load generator's processes: one that is lost is told, and none is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from loads_for_tests import is_alive, load, schedule_of, worker_pids
from powerband.bench import load as load_module
from powerband.bench.client.messages import (
    IN_FLIGHT,
    ChainMessage,
    FromWorker,
    RequestMessage,
    SegmentMessage,
    ServerAddress,
    StartSignal,
    WorkerDone,
    WorkerJob,
    WorkerProgress,
)
from powerband.bench.load import COMMAND, Live, LoadOptions, LoadResult, run_load
from powerband.errors import EnvironmentFault
from powerband.metrics.record import Outcome
from powerband.mock_server.behavior import Behavior
from powerband.mock_server.process import mock_server_process

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds workers by /proc")
PACED = Behavior(ttft_s=0.02, tpot_s=0.01)
COORDINATOR = """
import asyncio, sys
sys.path.insert(0, {folder!r})
from loads_for_tests import *
def report(live):
    if all(progress.sent for progress in live.workers.values()):
        print("sending", flush=True)
async def main():
    async with mock_server_process(Behavior(ttft_s=0.02)) as server:
        print(server.pid, flush=True)
        options = LoadOptions(workers=2, metrics_url=None)
        await run_load(server.target, schedule_of(20, 60), options, watch=report)
asyncio.run(main())
"""


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.02)


def test_a_worker_that_dies_is_an_error_that_says_so() -> None:
    killed: list[int] = []

    def kill_once(live: Live) -> None:
        if not killed and live.sent:
            killed.extend(worker_pids())
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(EnvironmentFault, match=r"A worker of the load generator ended before its work \(signal 9\)"):
        load(PACED, schedule_of(20, 20), workers=2, watch=kill_once)
    assert len(killed) == 2
    assert not any(is_alive(pid) for pid in killed)


def test_a_worker_that_is_stopped_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "_SILENT_S", 1.0)
    stopped: list[int] = []

    def stop_once(_live: object) -> None:
        if not stopped:
            stopped.extend(worker_pids())
            os.kill(stopped[0], signal.SIGSTOP)

    with pytest.raises(EnvironmentFault, match=r"A worker of the load generator .* has been silent for 1 s"):
        load(PACED, schedule_of(20, 60), watch=stop_once)
    assert not any(is_alive(pid) for pid in stopped)


def test_a_cancelled_run_leaves_no_worker() -> None:
    async def run() -> list[int]:
        async with mock_server_process(PACED) as server:
            options = LoadOptions(workers=2, metrics_url=None)
            sending = asyncio.Event()
            watch = lambda live: sending.set() if live.sent else None  # noqa: E731 (shorter than a function)
            task = asyncio.create_task(run_load(server.target, schedule_of(20, 20), options, watch=watch))
            await sending.wait()
            pids = worker_pids()
            assert len(pids) == 2
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return [*pids, server.pid]

    assert not any(is_alive(pid) for pid in asyncio.run(run()))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_its_coordinator(how: signal.Signals) -> None:
    code = COORDINATOR.format(folder=str(Path(__file__).parents[1]))
    coordinator = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert coordinator.stdout is not None
        server = int(coordinator.stdout.readline())
        assert coordinator.stdout.readline() == b"sending\n"
        pids = [server, *worker_pids(coordinator.pid)]
        assert len(pids) == 3
        coordinator.send_signal(how)
        coordinator.wait(60)
        wait_for(lambda: not any(is_alive(pid) for pid in pids))
    finally:
        coordinator.kill()
        coordinator.wait()


def test_what_a_worker_says_last_arrives_whole() -> None:
    """However slowly it is read: the worker ends when the last byte has left it."""
    requests = tuple(RequestMessage(index, (SegmentMessage("a", 1),), 1, 0, 0.0) for index in range(2000))
    nowhere = ServerAddress(base="http://127.0.0.1:1", endpoint="completions", model="m")
    chains = tuple(ChainMessage(request.index, 0.0, (request,)) for request in requests)
    job = WorkerJob(target=nowhere, chains=chains, end_s=1.0, timeout_s=5.0, drain_s=5.0, progress_s=60.0)
    with subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for message in (job, StartSignal(time.monotonic())):
            data = msgspec.msgpack.encode(message)
            process.stdin.write(len(data).to_bytes(4, "big") + data)
            process.stdin.flush()
        said = b""
        while piece := os.read(process.stdout.fileno(), 4096):
            said += piece
            time.sleep(0.005)
    messages = []
    while said:
        length = int.from_bytes(said[:4], "big")
        assert len(said) >= 4 + length, "the last message is cut off"
        messages.append(msgspec.msgpack.decode(said[4 : 4 + length], type=FromWorker))
        said = said[4 + length :]
    done = messages[-1]
    assert isinstance(done, WorkerDone)
    told = [m.samples for m in messages if isinstance(m, WorkerProgress)]
    assert sum(map(len, told)) + len(done.progress.samples) == 2000


def test_a_stop_ends_the_run_early() -> None:
    async def run() -> tuple[bool, float]:
        async with mock_server_process(PACED) as server:
            options = LoadOptions(metrics_url=None)
            result = await run_load(server.target, schedule_of(20, 60), options, stop=lambda live: live.elapsed_s > 0.5)
            return result.stopped, result.wall_s

    stopped, wall_s = asyncio.run(run())
    assert stopped
    assert wall_s < 30


def test_requests_in_flight_at_a_stop_are_reported_with_what_had_arrived() -> None:
    """50 at once, of which some answer at once and others never end: all of them count."""

    async def run() -> LoadResult:
        async with mock_server_process(Behavior(ttft_s=0.02, tpot_s=0.05)) as server:
            options = LoadOptions(workers=2, metrics_url=None)
            schedule = schedule_of(50, 60, output=10_000)
            return await run_load(server.target, schedule, options, stop=lambda live: live.chunks_in_flight > 200)

    result = asyncio.run(run())
    aborted = [sample for sample in result.samples if sample.outcome is Outcome.ABORTED]
    assert result.stopped
    assert len(aborted) == len(result.samples) > 0
    assert len(aborted) + result.unsent == result.schedule.num_requests
    assert sum(sample.output_tokens for sample in aborted) >= 200
    for sample in aborted:
        assert sample.ended_s is not None
        assert sample.error == IN_FLIGHT
        assert all(time_s <= sample.ended_s for time_s in sample.chunk_times_s)
