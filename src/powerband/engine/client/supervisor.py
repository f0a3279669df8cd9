"""The engine in a process of its own, seen from the API process: start it, send it requests, restart it when it dies.

    start() ──► STARTING ──► READY ──────── exit ─────────► DEAD ── back-off ──► STARTING ...
                              │ ▲                            ▲
                      silence ▼ │ heartbeat                  │
                             STALLED ── for long: killed ────┘

A restart that does not end in time is killed, too, and tried again.

Requests that were with an engine that died or fell silent end with an error; they are never run twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from powerband.core.loop import error_info
from powerband.core.request import EngineRequest
from powerband.core.step import FinishReason, TokenOutput
from powerband.engine.client.channel import EngineChannel
from powerband.engine.client.health import EngineHealth, EngineState, HealthMonitor, StallLimits
from powerband.engine.client.messages import (
    AbortRequests,
    CallResult,
    EngineInfo,
    Failed,
    FromEngine,
    Heartbeat,
    MethodCall,
    Outputs,
    Phase,
    Ready,
    RemoteError,
    StartupConfig,
    Submit,
)
from powerband.engine.client.stream import TokenStream
from powerband.errors import EngineDead, PowerbandError
from powerband.spec.settings import EngineSettings

logger = logging.getLogger(__name__)

# For libraries that read these when the engine's process loads them; who sets them knows better.
ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # what malloc hands out lies in huge pages (2.35 and newer)
    "GOMP_SPINCOUNT": "2000",  # torch's threads soon stop waiting on cores that the kernels' threads want
}

COMMAND = (sys.executable, "-m", "powerband.engine.process")
_STOP_GRACE_S = 5.0
_CALL_TIMEOUT_S = 30.0
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.25, 30.0
_MIN_RESTART_S = 60.0  # that a restart may take, or several times as long as the first start …
_RESTART_FACTOR = 5  # … which may have had the weights to download


@dataclass(frozen=True, slots=True)
class EngineExit:
    """Why an engine's process ended."""

    reason: str
    code: int | None  # 128 + the number of the signal that ended it; None: not known

    @classmethod
    def of(cls, error: PowerbandError, exited: asyncio.Task[int]) -> EngineExit:
        code = exited.result() if exited.done() else None
        return cls(error.message, 128 - code if code is not None and code < 0 else code)


@dataclass(slots=True)
class _ProcessRun:
    """One run of the engine's process."""

    process: subprocess.Popen[bytes]
    exited: asyncio.Task[int]
    started: asyncio.Future[EngineInfo]
    phase: str = "start"
    error: PowerbandError | None = None


class EngineProcess:
    """An engine in a child process. All methods belong to one event loop.

    `on_phase(name, fraction)`, `on_heartbeat`, `on_step(tokens computed)`, `on_residual(a step's observed seconds by
    the predicted)` and `on_restart` (another process has replaced one that died) are called in that loop. `command` is
    what to run as the engine; `log` is level and format of what it logs to stderr.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        command: Sequence[str] = COMMAND,
        limits: StallLimits | None = None,
        log: tuple[str, Literal["text", "json"]] = ("info", "text"),
        on_phase: Callable[[str, float], None] | None = None,
        on_heartbeat: Callable[[Heartbeat], None] | None = None,
        on_step: Callable[[int], None] | None = None,
        on_residual: Callable[[float], None] | None = None,
        on_restart: Callable[[EngineInfo], None] | None = None,
    ) -> None:
        self._settings = settings
        self._command = tuple(command)
        self._limits = limits or StallLimits()
        self._log = log
        self._on_phase = on_phase
        self._on_heartbeat = on_heartbeat
        self._on_step = on_step
        self._on_residual = on_residual
        self._on_restart = on_restart
        self._monitor = HealthMonitor(self._limits)
        self._streams: dict[str, TokenStream] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._last_call = 0
        self._channel: EngineChannel | None = None
        self._current: _ProcessRun | None = None
        self._supervision: asyncio.Task[None] | None = None
        self.num_restarts = 0
        self.last_exit: EngineExit | None = None  # before the last restart
        self._first_start_s = 0.0

    # ---- life

    async def start(self) -> EngineInfo:
        """Start the engine and wait until it is ready. Raises the engine's own error when it cannot start."""
        began_s = time.monotonic()
        try:
            info = await self._launch()
            self._first_start_s = time.monotonic() - began_s
        except PowerbandError as error:
            self._monitor.ended(EngineState.DEAD, str(error))
            raise
        self._supervision = asyncio.create_task(self._supervise(), name="engine-keeper")
        return info

    async def stop(self) -> None:
        """End the engine: asked first, killed after a few seconds. Requests in flight end with an error."""
        if self._supervision is not None:
            self._supervision.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervision
        self._monitor.ended(EngineState.STOPPED, "The engine was stopped.")
        self._fail_everything(EngineDead("The engine was stopped."))
        await self._end()

    @property
    def pid(self) -> int | None:
        return self._current.process.pid if self._current else None

    @property
    def num_malformed(self) -> int:
        return self._channel.num_malformed if self._channel else 0

    def health(self) -> EngineHealth:
        return self._monitor.health()

    # ---- work

    def submit(self, requests: Sequence[EngineRequest], stream: TokenStream | None = None) -> TokenStream:
        """Hand over requests that one reader waits for; closing the stream aborts them. stream: the reader's, if it has
        one already.

        What the engine refuses (queue full, too long) arrives as a request's only output, with `error` set.
        Raises EngineDead when no engine can take them now.
        """
        channel = self._ready_channel()
        stream = stream or TokenStream((), self._abort)
        stream.add([request.id for request in requests])
        for request in requests:
            self._streams[request.id] = stream
        for message in Submit.of(requests):
            channel.send(message)
        return stream

    async def call(self, method: str, *, timeout_s: float = _CALL_TIMEOUT_S, **kwargs: Any) -> Any:
        """Run an administrative method of the engine. Raises what it raised, or EngineDead."""
        channel = self._ready_channel()
        self._last_call = call_id = self._last_call + 1
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = answer
        channel.send(MethodCall(call_id, method, kwargs))
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError as error:
            raise EngineDead(f"The engine did not answer '{method}' within {timeout_s:.0f} s.") from error
        finally:
            del self._calls[call_id]

    def _ready_channel(self) -> EngineChannel:
        health = self.health()
        if not health.ready or self._channel is None:
            # By its code a gateway knows that the request has not been run, and was not what ended the engine.
            raise EngineDead(health.reason, code="engine_unavailable", hint="Try again in a moment.")
        return self._channel

    def _abort(self, ids: list[str]) -> None:
        known = [id for id in ids if self._streams.pop(id, None) is not None]
        if known and self._channel is not None:
            self._channel.send(AbortRequests(known))

    # ---- one run of the process

    async def _launch(self, timeout_s: float | None = None) -> EngineInfo:
        """Raises what the engine could not start for, and EngineDead when it is not ready after `timeout_s`."""
        began_s = time.monotonic()
        self._monitor = HealthMonitor(self._limits)
        loop = asyncio.get_running_loop()
        channel = self._channel = EngineChannel(self._receive)
        # In a process group of its own: Ctrl-C at the terminal is for the API process, which then drains.
        try:
            process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, process_group=0, env={**ENVIRONMENT, **os.environ}
            )
        except OSError as error:
            await self._end()
            raise EngineDead(f"The engine's process could not be started: {error}.") from error
        exited = loop.create_task(asyncio.to_thread(process.wait), name="engine-exit")
        current = self._current = _ProcessRun(process, exited, loop.create_future())
        # Standard input stays open: its end shows the engine that this process is gone.
        handover = msgspec.json.encode(StartupConfig(self._settings, str(channel.folder), *self._log))
        with contextlib.suppress(BrokenPipeError):
            if process.stdin is not None:
                process.stdin.write(handover + b"\n")
                process.stdin.flush()
        try:
            events: set[asyncio.Future[Any]] = {exited, current.started}
            done, _ = await asyncio.wait(events, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise EngineDead(f"The engine was not ready within {timeout_s:.0f} s ({current.phase}).")
            channel.drain()
            if not current.started.done():
                raise current.error or _death(exited.result(), f"while starting ({current.phase})")
        except BaseException:
            await self._end()
            raise
        channel.connect()
        self._monitor.started(time.monotonic() - began_s)
        return current.started.result()

    async def _end(self) -> None:
        """Make sure that the engine's process is gone, and its sockets with it."""
        current, channel = self._current, self._channel
        self._current = self._channel = None
        if current is not None:
            if current.process.stdin is not None:
                current.process.stdin.close()
            done, _ = await asyncio.wait({current.exited}, timeout=_STOP_GRACE_S)
            if not done:
                current.process.send_signal(signal.SIGKILL)
                await current.exited
        if channel is not None:
            channel.close()

    async def _supervise(self) -> None:
        """If supervision itself fails, mark the engine dead rather than serve unsupervised."""
        try:
            await self._keep_alive()
        except Exception as defect:
            logger.exception("The supervision of the engine failed.")
            error = EngineDead(f"The supervision of the engine failed: {defect!r}.", hint="Restart the server.")
            self._monitor.ended(EngineState.DEAD, str(error))
            self._fail_everything(error)

    async def _keep_alive(self) -> None:
        """Watch the engine; when it ends, fail the requests that wait for it, and start it again."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            if self._current is not None:
                since_s = time.monotonic()
                error = await self._watch(self._current)
                self.last_exit = EngineExit.of(error, self._current.exited)
                logger.error("%s It is started again.", error)
                self._monitor.ended(EngineState.DEAD, str(error))
                self._fail_everything(error)
                await self._end()
                if time.monotonic() - since_s > _LAST_BACKOFF_S:
                    backoff_s = _FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
            self.num_restarts += 1
            try:
                info = await self._launch(max(_MIN_RESTART_S, _RESTART_FACTOR * self._first_start_s))
                if self._on_restart is not None:
                    self._on_restart(info)
            except PowerbandError as failure:
                logger.error("The engine could not be started again: %s", failure)
                self._monitor.ended(EngineState.DEAD, str(failure))

    async def _watch(self, current: _ProcessRun) -> PowerbandError:
        """Returns why this process ended. Kills it when it has been silent for too long."""
        was_ready = True
        while True:
            done, _ = await asyncio.wait({current.exited}, timeout=self._limits.tick_s)
            if done:
                if self._channel is not None:
                    self._channel.drain()
                return current.error or _death(current.exited.result(), "while serving")
            self._monitor.tick()
            health = self.health()
            if was_ready and not health.ready:
                logger.error("%s Requests with it are ended.", health.reason)
                self._fail_everything(EngineDead(health.reason, code="engine_stalled"))
            was_ready = health.ready
            if self._monitor.hopeless:
                current.process.send_signal(signal.SIGKILL)
                await current.exited
                return EngineDead(health.reason)

    def _fail_everything(self, error: PowerbandError) -> None:
        """End every request and call with `error`; an engine that is still alive is sent an abort for them."""
        info = error_info(error)
        streams, self._streams = self._streams, {}
        if streams and self._channel is not None:
            self._channel.send(AbortRequests(list(streams)))
        now_s = time.monotonic()
        for id, stream in streams.items():
            stream.put(TokenOutput(id, [], now_s, FinishReason.ERROR, error=info))
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error)

    # ---- what comes from the engine

    def _receive(self, message: FromEngine) -> None:
        current = self._current
        if isinstance(message, Outputs):
            for output in message.outputs:
                self._deliver(output)
            if self._on_step is not None:
                for num_tokens in message.step_tokens:
                    self._on_step(num_tokens)
            if self._on_residual is not None:
                for ratio in message.step_ratios:
                    self._on_residual(ratio)
        elif isinstance(message, Heartbeat):
            self._monitor.on_heartbeat(message)
            if self._on_heartbeat is not None:
                self._on_heartbeat(message)
        elif isinstance(message, CallResult):
            self._answer(message)
        elif current is None:
            return
        elif isinstance(message, Phase):
            current.phase = message.name
            if self._on_phase is not None:
                self._on_phase(message.name, message.fraction)
        elif isinstance(message, Ready):
            if not current.started.done():
                current.started.set_result(message.info)
        elif isinstance(message, Failed):
            current.error = RemoteError(message.error, message.exit_code)

    def _deliver(self, output: TokenOutput) -> None:
        stream = self._streams.get(output.id)
        if stream is not None:
            if output.finish_reason is not None:
                del self._streams[output.id]
            stream.put(output)

    def _answer(self, message: CallResult) -> None:
        answer = self._calls.get(message.call_id)
        if answer is not None and not answer.done():
            if message.error is not None:
                answer.set_exception(RemoteError(message.error))
            else:
                answer.set_result(message.value)


def _death(returncode: int, when: str) -> EngineDead:
    if returncode < 0:
        try:
            how = f"was killed by {signal.Signals(-returncode).name}"
        except ValueError:
            how = f"was killed by signal {-returncode}"
        hint = (
            "On SIGKILL, look whether the machine ran out of memory (dmesg)." if returncode == -signal.SIGKILL else ""
        )
    else:
        how, hint = f"ended with status {returncode}", "Its own messages are above."
    return EngineDead(f"The engine's process {how} {when}.", hint=hint)
