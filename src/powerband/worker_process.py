"""Worker processes for untrusted input whose cost is not known before: chat templates, grammars.

Each is limited by the kernel, has nothing secret, and is replaced when it overruns its bounds. The other side of the
pipes is worker_loop.py.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from powerband.errors import EnvironmentFault
from powerband.worker_loop import ALARM_SIGNALS, WALL_TIME_FACTOR

# What a worker needs to find Python, the package and the local time. Nothing secret is handed on.
_ENVIRONMENT = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV")

_ALARM_MARGIN_S = 0.5  # after a worker's own alarm


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """Bounds on the work for one request."""

    seconds: float = 2.0  # of CPU time; by the clock, WALL_TIME_FACTOR times as many
    memory_bytes: int = 512 * 2**20
    max_workers: int = 4
    start_seconds: float = 20.0  # a worker's start, on a machine that is busy


class TimedOut(Exception):
    """The worker did not answer in time, or died."""


class WorkerProcess:
    """One process that runs `module`, and the pipes to it. `answer`: its answer to `first`, with which it starts."""

    def __init__(self, module: str, first: dict[str, Any], limits: WorkerLimits) -> None:
        self._limits = limits
        package_root = str(Path(__file__).parents[1])
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(limits.memory_bytes), str(limits.seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | {"PYTHONPATH": package_root},
            bufsize=0,
            start_new_session=True,
        )
        self._in = cast(IO[bytes], self._process.stdin)
        self._out = cast(IO[bytes], self._process.stdout)
        os.set_blocking(self._in.fileno(), False)
        os.set_blocking(self._out.fileno(), False)
        self.answer: dict[str, Any] = self._started(first)

    def _started(self, first: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.ask(first, self._limits.start_seconds)
        except TimedOut:
            self.kill()
            return {"error": "reading it took too long or too much memory", "kind": "limit"}

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a request and wait for the answer. Raises TimedOut, after which the worker must be killed."""
        deadline_s = time.monotonic() + timeout_s
        body = msgspec.json.encode(request)  # json.dumps is ten times slower, and no other thread runs meanwhile
        self._send(memoryview(len(body).to_bytes(4, "big") + body), deadline_s)
        size = int.from_bytes(self._receive(4, deadline_s), "big")
        answer: dict[str, Any] = json.loads(self._receive(size, deadline_s))
        return answer

    def kill(self) -> bool:
        """Whether its own alarm had ended it already."""
        self._process.kill()
        self._in.close()
        self._out.close()
        return -self._process.wait() in ALARM_SIGNALS

    def _send(self, data: memoryview, deadline_s: float) -> None:
        while data:
            self._wait(self._in, selectors.EVENT_WRITE, deadline_s)
            try:
                data = data[os.write(self._in.fileno(), data) :]
            except BrokenPipeError as error:
                raise TimedOut from error

    def _receive(self, size: int, deadline_s: float) -> bytes:
        chunks: list[bytes] = []
        while size:
            self._wait(self._out, selectors.EVENT_READ, deadline_s)
            chunk = os.read(self._out.fileno(), size)
            if not chunk:
                raise TimedOut
            chunks.append(chunk)
            size -= len(chunk)
        return b"".join(chunks)

    def _wait(self, stream: IO[bytes], event: int, deadline_s: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(stream, event)
            if not selector.select(max(0.0, deadline_s - time.monotonic())):
                raise TimedOut


class WorkerPool:
    """Asks a free worker; starts another by `start` when none is free, up to a limit. Threads may share it.

    `start` raises EnvironmentFault. what: the workers' task, for errors. is_retried: a request whose worker was lost,
    which may not be its fault, is asked once more.
    """

    def __init__(
        self, start: Callable[[], WorkerProcess], limits: WorkerLimits, *, what: str, is_retried: bool = True
    ) -> None:
        self._start = start
        self._limits = limits
        self._what = what
        self._is_retried = is_retried
        self._idle: list[WorkerProcess] = []
        self._num_workers = 0
        self._condition = threading.Condition()
        self._finalizer = weakref.finalize(self, _kill_all, self._idle)

    def warm_up(self) -> dict[str, Any]:
        """Start a worker, if there is none that is free; return what one said when it started."""
        worker = self._take()
        self._give_back(worker)
        return worker.answer

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of a worker; with "error" and "kind": "limit" where it took too much time or memory.

        Blocks for the time limit, or `WALL_TIME_FACTOR` times that where the cores are busy, at most twice where a
        worker was lost. Work that takes too long is ended by the worker's own alarm. A worker that ended otherwise, or
        is silent even after that, was killed or stopped. Raises EnvironmentFault where no worker becomes free, or one
        cannot start.
        """
        for is_last in (not self._is_retried, True):
            worker = self._take()
            try:
                answer = worker.ask(request, self._limits.seconds * WALL_TIME_FACTOR + _ALARM_MARGIN_S)
            except TimedOut:
                is_alarm = self._discard(worker)
                if is_alarm or is_last:
                    break
            except BaseException:
                self._discard(worker)
                raise
            else:
                self._give_back(worker)
                return answer
        return {
            "error": f"it took more than {self._limits.seconds:g} s of CPU time or too much memory",
            "kind": "limit",
        }

    def close(self) -> None:
        """End the workers. Requests in progress finish first."""
        self._finalizer()

    def _take(self) -> WorkerProcess:
        deadline_s = time.monotonic() + self._limits.seconds + 1
        with self._condition:
            while not self._idle and self._num_workers >= self._limits.max_workers:
                if not self._condition.wait(deadline_s - time.monotonic()):
                    raise EnvironmentFault(f"All workers for {self._what} are busy.", hint="Try again in a moment.")
            if self._idle:
                return self._idle.pop()
            self._num_workers += 1
        try:
            return self._start()
        except (OSError, EnvironmentFault):
            self._forget_one()
            raise

    def _give_back(self, worker: WorkerProcess) -> None:
        with self._condition:
            self._idle.append(worker)
            self._condition.notify()
        if not self._finalizer.alive:
            _kill_all(self._idle)

    def _discard(self, worker: WorkerProcess) -> bool:
        """Whether its own alarm had ended it."""
        is_alarm = worker.kill()
        self._forget_one()
        return is_alarm

    def _forget_one(self) -> None:
        with self._condition:
            self._num_workers -= 1
            self._condition.notify()


def _kill_all(workers: list[WorkerProcess]) -> None:
    while workers:
        workers.pop().kill()
