"""A few worker processes that render chat templates, each replaced when it overruns its bounds."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from powerband.errors import EnvironmentFault, InvalidRequest

# What a worker needs to find Python, the package and the local time. Nothing secret is handed on.
_ENVIRONMENT = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV")

_ALARM_MARGIN_S = 0.5  # after a worker's own alarm


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateLimits:
    """Bounds on one rendering."""

    seconds: float = 2.0
    memory_bytes: int = 512 * 2**20
    max_workers: int = 4
    start_seconds: float = 20.0  # a worker's start, on a machine that is busy


class _TimedOut(Exception):
    """The worker did not answer in time, or died."""


class _Worker:
    """One process and the pipes to it."""

    def __init__(
        self, sources: dict[str, str], limits: TemplateLimits, variables: dict[str, str] | None = None
    ) -> None:
        self._limits = limits
        package_root = str(Path(__file__).parents[2])
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "powerband.text.template_worker", str(limits.memory_bytes), str(limits.seconds)],
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
        self.answer: dict[str, Any] = self._loaded({"sources": sources, "variables": variables or {}})

    def _loaded(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.ask(request, self._limits.start_seconds)
        except _TimedOut:
            self.kill()
            return {"error": "reading it took too long or too much memory", "kind": "limit"}

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a request and wait for the answer. Raises _TimedOut, after which the worker must be killed."""
        deadline_s = time.monotonic() + timeout_s
        body = msgspec.json.encode(request)  # json.dumps is ten times slower, and no other thread runs meanwhile
        self._send(memoryview(len(body).to_bytes(4, "big") + body), deadline_s)
        size = int.from_bytes(self._receive(4, deadline_s), "big")
        answer: dict[str, Any] = json.loads(self._receive(size, deadline_s))
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._in.close()
        self._out.close()
        self._process.wait()

    def _send(self, data: memoryview, deadline_s: float) -> None:
        while data:
            self._wait(self._in, selectors.EVENT_WRITE, deadline_s)
            try:
                data = data[os.write(self._in.fileno(), data) :]
            except BrokenPipeError as error:
                raise _TimedOut from error

    def _receive(self, size: int, deadline_s: float) -> bytes:
        chunks: list[bytes] = []
        while size:
            self._wait(self._out, selectors.EVENT_READ, deadline_s)
            chunk = os.read(self._out.fileno(), size)
            if not chunk:
                raise _TimedOut
            chunks.append(chunk)
            size -= len(chunk)
        return b"".join(chunks)

    def _wait(self, stream: IO[bytes], event: int, deadline_s: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(stream, event)
            if not selector.select(max(0.0, deadline_s - time.monotonic())):
                raise _TimedOut


class TemplateProcesses:
    """Renders in a free worker; starts another when none is free, up to a limit. Threads may share it.

    `reads` is by template what template_probes.learn found.
    """

    def __init__(self, sources: dict[str, str], variables: dict[str, str], limits: TemplateLimits) -> None:
        self._sources = sources
        self._variables = variables
        self._limits = limits
        self._idle: list[_Worker] = []
        self._num_workers = 1
        self._condition = threading.Condition()
        worker = self._started()
        self.reads: dict[str, dict[str, Any]] = worker.answer["reads"]
        self._idle.append(worker)
        self._finalizer = weakref.finalize(self, _kill_all, self._idle)

    def render(self, name: str, context: dict[str, Any], max_chars: int) -> tuple[str, list[int] | None]:
        """The text, and the first content that it leaves out (as template_probes.left_out has it).

        Blocks for a little more than the time limit, at most twice where a worker was lost. Raises InvalidRequest.

        A rendering that takes too long is ended by its worker's own alarm. A worker that ended earlier, or is silent
        even after that, was killed or stopped, which is not the template's fault: another worker tries once more.
        """
        request = {"name": name, "context": context, "max_chars": max_chars}
        for is_last in (False, True):
            worker, began_s = self._take(), time.monotonic()
            try:
                answer = worker.ask(request, self._limits.seconds + _ALARM_MARGIN_S)
            except _TimedOut:
                self._discard(worker)
                is_alarm = self._limits.seconds <= time.monotonic() - began_s < self._limits.seconds + _ALARM_MARGIN_S
                answer = {
                    "error": f"it took longer than {self._limits.seconds:g} s or too much memory",
                    "kind": "limit",
                }
                if is_alarm or is_last:
                    break
            except BaseException:
                self._discard(worker)
                raise
            else:
                self._give_back(worker)
                break
        if "error" in answer:
            raise InvalidRequest(
                f"The chat template refused these messages: {answer['error'].rstrip('.')}.",
                hint="Check the order of roles and the fields of each message.",
                code="chat_template_limit" if answer["kind"] == "limit" else "chat_template_error",
                param="messages",
            )
        return answer["text"], answer["left_out"]

    def close(self) -> None:
        """End the workers. Renderings in progress finish first."""
        self._finalizer()

    def _started(self) -> _Worker:
        worker = _Worker(self._sources, self._limits, self._variables)
        if "error" in worker.answer:
            worker.kill()
            raise EnvironmentFault(
                f"The chat template cannot be used: {worker.answer['error']}.",
                hint="Give another with --chat-template FILE.",
                code="chat_template_invalid",
            )
        return worker

    def _take(self) -> _Worker:
        deadline_s = time.monotonic() + self._limits.seconds + 1
        with self._condition:
            while not self._idle and self._num_workers >= self._limits.max_workers:
                if not self._condition.wait(deadline_s - time.monotonic()):
                    raise EnvironmentFault("All workers for chat templates are busy.", hint="Try again in a moment.")
            if self._idle:
                return self._idle.pop()
            self._num_workers += 1
        try:
            return self._started()
        except (OSError, EnvironmentFault):
            self._forget_one()
            raise

    def _give_back(self, worker: _Worker) -> None:
        with self._condition:
            self._idle.append(worker)
            self._condition.notify()
        if not self._finalizer.alive:
            _kill_all(self._idle)

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        self._forget_one()

    def _forget_one(self) -> None:
        with self._condition:
            self._num_workers -= 1
            self._condition.notify()


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()
