"""Loads on scripted servers: short, light, and with the server's own truth beside what the client says."""

from __future__ import annotations

import asyncio
import functools
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import ParamSpec

import msgspec

from powerband.bench.client.messages import Endpoint, Sample, ServerAddress
from powerband.bench.load import Live, LoadOptions, LoadResult, run_load
from powerband.calibration.client_capacity import request_digests
from powerband.metrics.figures import Summary, Window, summarize
from powerband.mock_server.behavior import Behavior, ServerRecord
from powerband.mock_server.process import mock_server_process
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import Arrivals, OpenLoop
from powerband.spec.workload.lengths import Fixed
from powerband.spec.workload.schedule import Schedule
from powerband.spec.workload.workload import RequestMix, Workload


@dataclass
class Run:
    """start_at: of the run, on the monotonic clock. truths: the server's, by arrival."""

    result: LoadResult
    target: ServerAddress
    records: list[ServerRecord]
    start_at: float

    @property
    def samples(self) -> tuple[Sample, ...]:
        return self.result.samples

    def pairs(self) -> list[tuple[Sample, ServerRecord]]:
        """Of requests that the server knows."""
        known = {record.digest: record for record in self.records}
        digests = request_digests(self.target, self.result.schedule)
        return [(sample, known[digests[sample.index]]) for sample in self.samples if digests[sample.index] in known]

    def summary(self, slo: SLO | None = None) -> Summary:
        return summarize([sample.record() for sample in self.samples], Window(0.0, 1e6), slo)

    def median(self, figure: str) -> float:
        values = [getattr(sample.record(), f"{figure}_s") for sample in self.samples]
        return median(value for value in values if value is not None)


def schedule_of(
    rate: float = 0.0,
    seconds: float = math.inf,
    *,
    output: int = 8,
    requests: int | None = None,
    arrivals: Arrivals | None = None,
    burstiness: float = math.inf,
) -> Schedule:
    """At a constant rate, unless `arrivals` says otherwise."""
    process = arrivals or OpenLoop.at(rate, burstiness)
    workload = Workload(name="test", arrivals=process, requests=RequestMix(Fixed(12), Fixed(output)))
    return workload.draw(1, duration_s=seconds, num_requests=requests)


def load(
    script: Behavior,
    schedule: Schedule,
    *,
    endpoint: Endpoint = "completions",
    watch: Callable[[Live], object] | None = None,
    **options: object,
) -> Run:
    """One run from its start to its end."""

    async def run() -> Run:
        lives: list[Live] = []

        def note(live: Live) -> None:
            lives.append(live)
            if watch is not None:
                watch(live)

        async with mock_server_process(script) as server:
            target = msgspec.structs.replace(server.target, endpoint=endpoint)
            chosen = LoadOptions(**({"metrics_url": None, "drain_s": 10.0} | options))  # type: ignore[arg-type]  # by name
            result = await run_load(target, schedule, chosen, watch=note)
            return Run(result, target, await server.records(), lives[-1].start_at)

    return asyncio.run(run())


P = ParamSpec("P")


_late_s: list[float] = []


def close_s() -> float:
    """How near a time has to come to the true one: 1 ms, and what this machine is late while the test runs."""
    return 0.001 + 3 * (sorted(_late_s)[int(0.9 * len(_late_s))] if _late_s else 0.0)


def best_of_five(test: Callable[P, None]) -> Callable[P, None]:
    """For what a busy machine may upset, but not each time. Beside it, `close_s` finds out how busy it is."""

    def measure(has_ended: threading.Event) -> None:
        while not has_ended.is_set():
            begun_s = time.monotonic()
            time.sleep(0.002)
            _late_s.append(time.monotonic() - begun_s - 0.002)

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        for attempt in range(5):
            _late_s.clear()
            has_ended = threading.Event()
            thread = threading.Thread(target=measure, args=(has_ended,), daemon=True)
            thread.start()
            try:
                return test(*args, **kwargs)
            except AssertionError:
                if attempt == 4:
                    raise
            finally:
                has_ended.set()
                thread.join()
        raise AssertionError

    return run


def worker_pids(parent: int | None = None) -> list[int]:
    """Of the load generator's workers that a process (this one) has started and that are alive."""
    tasks = Path(f"/proc/{parent or os.getpid()}/task").iterdir()
    pids = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    return [pid for pid in pids if b"powerband.bench.client.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def is_alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
