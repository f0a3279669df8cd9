"""One run of a schedule: workers are started, each gets its chains, and what they report is gathered."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from powerband.bench.client.messages import (
    STOP,
    ChainMessage,
    FromWorker,
    RequestMessage,
    Sample,
    SegmentMessage,
    ServerAddress,
    StartSignal,
    WorkerDone,
    WorkerFailure,
    WorkerJob,
    WorkerProgress,
    WorkerReady,
)
from powerband.bench.client.worker import read_message
from powerband.bench.server_metrics import ServerMetrics, scrape
from powerband.child_process import send_signal
from powerband.errors import EnvironmentFault
from powerband.metrics.figures import Window
from powerband.spec.workload.schedule import Schedule

COMMAND = (sys.executable, "-m", "powerband.bench.client.worker")
_START_S = 0.1  # from the word to go to the run's start, so that every worker has read it
_NO_END_S = 1e9
_STOP_S = 30.0  # for workers to report what is in flight when a load is stopped
_SILENT_S = 60.0  # that a worker may be, until it counts as stopped
_DECODER: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How a load is sent."""

    workers: int = 1  # processes
    timeout_s: float = 600.0  # per request, from its scheduled time
    drain_s: float = 120.0  # for requests that still run after the last arrival
    metrics_url: str | None = ""  # of the server; '': /metrics beside the API; None: not scraped


@dataclass(slots=True)
class Live:
    """Where a run is. Kept up to date while it runs; `samples` in the order in which requests ended."""

    schedule: Schedule
    start_at: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    workers: dict[int, WorkerProgress] = field(default_factory=dict)
    server: ServerMetrics = field(default_factory=ServerMetrics)
    unsent: int = 0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.start_at

    @property
    def sent(self) -> int:
        return sum(progress.sent for progress in self.workers.values())

    @property
    def running(self) -> int:
        return sum(progress.running for progress in self.workers.values())

    @property
    def chunks_in_flight(self) -> int:
        """Received so far of the requests that have not ended: about a token each."""
        return sum(progress.chunks_in_flight for progress in self.workers.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What became of a load."""

    schedule: Schedule
    samples: tuple[Sample, ...]  # by index
    server: ServerMetrics
    wall_s: float
    client_share: float  # of one core, used by the busiest worker
    chunks_per_s: float  # received by the busiest worker
    unsent: int
    stopped: bool  # by `stop`, before its end
    interrupted: bool = False  # by the user, before its end


async def run_load(
    target: ServerAddress,
    schedule: Schedule,
    options: LoadOptions,
    *,
    watch: Callable[[Live], object] | None = None,
    stop: Callable[[Live], bool] | None = None,
) -> LoadResult:
    """Send the schedule. watch: called several times a second. stop: asked as often; True ends the run early.

    Raises EnvironmentFault when a worker cannot be started or breaks.
    """
    shares = shards(schedule, options.workers)
    live = Live(schedule)
    end_s = schedule.duration_s if math.isfinite(schedule.duration_s) else _NO_END_S
    processes: list[asyncio.subprocess.Process] = []
    tasks: list[asyncio.Task[None]] = []
    try:
        for chains in shares:
            processes.append(await _start())
            job = WorkerJob(
                target=target,
                chains=chains,
                end_s=end_s,
                timeout_s=options.timeout_s,
                drain_s=options.drain_s,
            )
            await _send(processes[-1], job)
        for process in processes:
            await _ready(process)
        live.start_at = time.monotonic() + _START_S
        for process in processes:
            await _send(process, StartSignal(live.start_at))
        gathering = [asyncio.create_task(_gather(number, process, live)) for number, process in enumerate(processes)]
        tasks += gathering
        if options.metrics_url is not None:
            tasks.append(asyncio.create_task(scrape(target, live.start_at, live.server, options.metrics_url)))
        stopped = await _follow(gathering, live, watch, stop)
        if stopped:
            await _stop(processes, gathering)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for process in processes:
            send_signal(process, signal.SIGKILL)
            await process.wait()
    return _result(live, stopped)


def shards(schedule: Schedule, workers: int) -> list[tuple[ChainMessage, ...]]:
    """Whole chains, dealt out one after the other; no worker gets none."""
    chains = [
        ChainMessage(
            number,
            chain.start_s,
            tuple(
                RequestMessage(
                    request.index,
                    tuple(SegmentMessage(s.key, s.tokens, s.text) for s in request.segments),
                    request.output_tokens,
                    request.turn,
                    request.think_s,
                )
                for request in chain.requests
            ),
        )
        for number, chain in enumerate(schedule.chains)
    ]
    return [tuple(chains[worker::workers]) for worker in range(min(workers, len(chains)))]


def steady_window(samples: Sequence[Sample], warm_up: float, cool_down: float) -> Window:
    """The part of a run that counts: without its first `warm_up` and its last `cool_down`, both shares of the time from
    the start to the last arrival. Where all arrive nearly at once, in less than a tenth of the time that they take, it
    is the whole run, to the last token.
    """
    last_s = max((sample.scheduled_s for sample in samples), default=0.0)
    end_s = max((sample.chunk_times_s[-1] for sample in samples if sample.chunk_times_s), default=0.0)
    if last_s < end_s / 10:
        return Window(0.0, end_s)
    return Window(last_s * warm_up, last_s * (1 - cool_down))


async def _start() -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *COMMAND,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C is the coordinator's to handle
        )
    except OSError as problem:
        raise EnvironmentFault(f"A worker of the load generator cannot be started: {problem}.") from None


async def _send(process: asyncio.subprocess.Process, message: WorkerJob | StartSignal) -> None:
    data = msgspec.msgpack.encode(message)
    if process.stdin is None:
        raise EnvironmentFault("A worker of the load generator has no stdin.")
    with contextlib.suppress(ConnectionError):  # a worker that is gone says so by its end
        process.stdin.write(len(data).to_bytes(4, "big") + data)
        try:
            await asyncio.wait_for(process.stdin.drain(), _SILENT_S)
        except TimeoutError:
            raise _silent(process) from None


async def _receive(process: asyncio.subprocess.Process) -> FromWorker:
    """Raises EnvironmentFault when the worker has failed, is gone, or is silent: it reports several times a second."""
    try:
        if process.stdout is None:
            raise EOFError
        message = _DECODER.decode(await asyncio.wait_for(read_message(process.stdout), _SILENT_S))
    except TimeoutError:
        raise _silent(process) from None
    except EOFError:  # asyncio.IncompleteReadError is one
        how = await _exit_text(process)
        raise EnvironmentFault(f"A worker of the load generator ended before its work{how}.") from None
    if isinstance(message, WorkerFailure):
        raise EnvironmentFault(f"A worker of the load generator failed: {message.message}")
    return message


def _silent(process: asyncio.subprocess.Process) -> EnvironmentFault:
    return EnvironmentFault(
        f"A worker of the load generator (pid {process.pid}) has been silent for {_SILENT_S:.0f} s.",
        hint="It is stopped, or this machine has no time for it.",
    )


async def _exit_text(process: asyncio.subprocess.Process) -> str:
    """How it ended, for a message."""
    with contextlib.suppress(TimeoutError):
        code = await asyncio.wait_for(process.wait(), 1.0)
        return f" (signal {-code})" if code < 0 else f" (exit {code})"
    return ""


async def _ready(process: asyncio.subprocess.Process) -> None:
    while not isinstance(await _receive(process), WorkerReady):
        continue


async def _gather(number: int, process: asyncio.subprocess.Process, live: Live) -> None:
    """Until the worker is done."""
    while True:
        message = await _receive(process)
        if isinstance(message, WorkerProgress):
            _apply_progress(number, message, live)
        elif isinstance(message, WorkerDone):
            _apply_progress(number, message.progress, live)
            live.unsent += message.unsent
            return


def _apply_progress(number: int, progress: WorkerProgress, live: Live) -> None:
    live.samples += progress.samples
    live.workers[number] = msgspec.structs.replace(progress, samples=())


async def _follow(
    gathering: Sequence[asyncio.Task[None]],
    live: Live,
    watch: Callable[[Live], object] | None,
    stop: Callable[[Live], bool] | None,
) -> bool:
    """Until all workers are done, or `stop` says so (True)."""
    left = set(gathering)
    while left:
        done, left = await asyncio.wait(left, timeout=0.25, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        if watch is not None:
            watch(live)
        if left and stop is not None and stop(live):
            return True
    return False


async def _stop(processes: Sequence[asyncio.subprocess.Process], gathering: Sequence[asyncio.Task[None]]) -> None:
    """End the load, and wait for the workers to report the requests in flight."""
    for process in processes:
        if process.stdin is not None:
            with contextlib.suppress(ConnectionError):
                process.stdin.write(STOP)
    await asyncio.wait(gathering, timeout=_STOP_S)


def _result(live: Live, stopped: bool) -> LoadResult:
    wall_s = max(live.elapsed_s, 1e-9)
    busiest = max(live.workers.values(), key=lambda progress: progress.cpu_s, default=WorkerProgress(sent=0, running=0))
    return LoadResult(
        schedule=live.schedule,
        samples=tuple(sorted(live.samples, key=lambda sample: sample.index)),
        server=live.server,
        wall_s=wall_s,
        client_share=busiest.cpu_s / wall_s,
        chunks_per_s=busiest.chunks / wall_s,
        unsent=live.unsent,
        stopped=stopped,
    )
