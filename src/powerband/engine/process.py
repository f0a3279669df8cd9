"""The engine core's own process: `python -m powerband.engine.process`, started and watched by client/supervisor.py.

main thread        loops over EngineCore.step(); commands come from the requests' socket, outputs leave once per step
heartbeat thread   reports several times a second that the process is alive, and when the loop last ran
input's end        of standard input means that the API process is gone or wants this one to end
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq

from powerband.core.clock import Clock, MonotonicClock
from powerband.core.loop import Abort, Add, Call, Command, EngineCore, Inbox, StepRecord, error_info
from powerband.core.stats import SchedulerStats
from powerband.core.step import FinishReason
from powerband.engine.client import messages
from powerband.engine.client.messages import (
    OUTPUTS_SOCKET,
    REQUESTS_SOCKET,
    AdapterInfo,
    EngineInfo,
    Failed,
    FromEngine,
    Heartbeat,
    MessageCodec,
    Outputs,
    Phase,
    Ready,
    StartupConfig,
    ToEngine,
)
from powerband.engine.residuals import Residuals
from powerband.errors import PowerbandError, UsageError
from powerband.metrics.logging import set_up_logging
from powerband.spec.settings import EngineSettings

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.25
_EXIT_GRACE_S = 2.0
_SLOW_METHOD_POLL_S = 0.01  # while one runs, an idle engine looks so often whether it is done
_MAX_COMMANDS = 64  # taken in between two steps

Progress = Callable[[str, float], None]


class LoadedAdapters(Protocol):
    """The LoRA adapters of an engine, as AdapterRegistry has them."""

    def begin_load(self, name: str, source: str, replace: bool = False) -> Callable[[], AdapterInfo]: ...
    def remove(self, name: str) -> AdapterInfo: ...
    def release(self) -> None: ...


class Built(Protocol):
    """What a builder of engines returns."""

    core: EngineCore
    info: EngineInfo

    @property
    def adapters(self) -> LoadedAdapters: ...
    @property
    def residuals(self) -> Residuals | None: ...

    def close(self) -> None: ...


class Build(Protocol):
    def __call__(self, settings: EngineSettings, *, inbox: Inbox, clock: Clock, progress: Progress) -> Built: ...


class SocketWriter:
    """Sends one thread's messages to the API process."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path) -> None:
        self._socket = context.socket(zmq.PUSH)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.LINGER, 1000)
        self._socket.connect(f"ipc://{folder / OUTPUTS_SOCKET}")
        self._codec = MessageCodec(ToEngine)

    def send(self, message: FromEngine) -> None:
        self._socket.send(self._codec.encode(message))

    def close(self) -> None:
        self._socket.close()


class LoopStatus:
    """When the loop last ran, and whether it is busy: written by the loop, read by the heartbeat thread."""

    def __init__(self) -> None:
        self.loop_s = time.monotonic()
        self.busy = False
        self.num_malformed = 0
        self.stats: SchedulerStats | None = None
        self.step_tokens: list[int] = []
        self.ending = threading.Event()

    def touch(self, busy: bool) -> None:
        self.loop_s = time.monotonic()
        self.busy = busy

    def heartbeat(self) -> Heartbeat | None:
        if self.stats is None:
            return None
        return Heartbeat(time.monotonic(), self.loop_s, self.busy, self.num_malformed, self.stats)


class SocketInbox:
    """Commands from the API process. An idle engine sleeps on the socket itself, so a request wakes it at once."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], folder: Path, status: LoopStatus, writer: SocketWriter
    ) -> None:
        self._socket = context.socket(zmq.PULL)
        self._socket.set(zmq.RCVHWM, 0)
        path = folder / REQUESTS_SOCKET
        self._socket.bind(f"ipc://{path}")
        path.chmod(0o600)
        self._codec = MessageCodec(ToEngine)
        self._status = status
        self._writer = writer
        self._commands: deque[Iterator[Command]] = deque()  # of messages that were read, in their order
        self.methods: dict[str, Callable[..., Any]] = {}
        # These take long: they run in a thread, and return what finishes the work in the loop.
        self.slow_methods: dict[str, Callable[..., Callable[[], Any]]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="slow-methods")
        self._running: deque[tuple[messages.MethodCall, Future[Callable[[], Any]]]] = deque()
        self.idle: Callable[[], None] = lambda: None
        self.administered: Callable[[], None] = lambda: None

    def poll(self, now: float) -> list[Command]:  # noqa: ARG002 (a live inbox has no future)
        """At most `_MAX_COMMANDS`, so that running requests advance; the rest comes with the next steps."""
        self._status.touch(busy=True)
        commands: list[Command] = []
        while self._running and self._running[0][1].done():
            commands.append(self._finishing(*self._running.popleft()))
        while len(commands) < _MAX_COMMANDS:
            if self._commands:
                commands += islice(self._commands[0], _MAX_COMMANDS - len(commands))
                if len(commands) < _MAX_COMMANDS:
                    self._commands.popleft()
            elif int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
                self._commands.append(self._read(self._socket.recv(zmq.NOBLOCK)))
            else:
                break
        return commands

    def next_time(self) -> float | None:
        return None

    def wait(self, until: float | None) -> None:  # noqa: ARG002 (it never waits longer than a heartbeat)
        if self._commands:
            return
        self._status.touch(busy=False)
        self.idle()
        self._socket.poll(int(1000 * (_SLOW_METHOD_POLL_S if self._running else HEARTBEAT_S)))

    def _read(self, data: bytes) -> Iterator[Command]:
        message = self._codec.decode(data)
        match message:
            case messages.Submit():
                return map(Add, message.requests())
            case messages.AbortRequests(ids):
                return iter([Abort(id, FinishReason.ABORT) for id in ids])
            case messages.MethodCall() if message.method in self.slow_methods:
                future = self._thread.submit(self.slow_methods[message.method], **message.kwargs)
                self._running.append((message, future))
                return iter(())
            case messages.MethodCall():
                return iter([Call(lambda: self._answer(message))])
        self._status.num_malformed = self._codec.num_malformed
        logger.warning("Dropped %d bytes on the requests' socket that are not a valid message.", len(data))
        return iter(())

    def _finishing(self, call: messages.MethodCall, future: Future[Callable[[], Any]]) -> Call:
        return Call(lambda: self._send_result(call, lambda: future.result()()))

    def _answer(self, call: messages.MethodCall) -> None:
        def run() -> Any:
            method = self.methods.get(call.method)
            if method is None:
                raise UsageError(
                    f"The engine has no method '{call.method}'.", hint=f"It has {', '.join(self.methods)}."
                )
            return method(**call.kwargs)

        self._send_result(call, run)

    def _send_result(self, call: messages.MethodCall, run: Callable[[], Any]) -> None:
        result = messages.CallResult(call.call_id)
        try:
            result.value = run()
            self.administered()  # no heartbeat after the answer carries older stats
        except Exception as error:  # the caller gets it as the answer
            result.error = error_info(error)
        self._writer.send(result)


def _build_engine(settings: EngineSettings, *, inbox: Inbox, clock: Clock, progress: Progress) -> Built:
    from powerband.engine.build import build_engine  # imports torch, which takes a while

    return build_engine(settings, inbox=inbox, clock=clock, progress=progress)


def main(build: Build = _build_engine) -> int:
    """Serve until standard input ends. Returns the exit status: 0, or that of the error which was reported."""
    startup = msgspec.json.decode(sys.stdin.buffer.readline(), type=StartupConfig)
    set_up_logging(startup.log_level, startup.log_format)
    status = LoopStatus()
    folder = Path(startup.folder)
    threading.Thread(target=_end_with_input, args=(status, folder), daemon=True, name="input").start()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    writer = SocketWriter(context, folder)
    inbox = SocketInbox(context, folder, status, writer)
    try:
        engine = build(
            startup.settings,
            inbox=inbox,
            clock=MonotonicClock(),
            progress=lambda name, fraction: writer.send(Phase(name, fraction)),
        )
        scheduler = engine.core.scheduler
        inbox.methods = {
            "pause": scheduler.pause,
            "resume": scheduler.resume,
            "reset_prefix_cache": scheduler.reset_prefix_cache,
            "stats": scheduler.stats,
            "unload_adapter": engine.adapters.remove,
        }
        inbox.slow_methods = {"load_adapter": engine.adapters.begin_load}
        _freeze_gc()
        status.stats = scheduler.stats()
        threading.Thread(target=_send_heartbeats, args=(context, folder, status), daemon=True, name="heartbeat").start()
        writer.send(Ready(engine.info))
        try:
            _serve(engine, inbox, status, writer)
        finally:
            engine.close()
    except Exception as error:
        exit_code = error.exit_code if isinstance(error, PowerbandError) else PowerbandError.exit_code
        if not isinstance(error, PowerbandError):
            logger.exception("The engine failed with an unexpected error.")
        writer.send(Failed(error_info(error), exit_code))
        return exit_code
    finally:
        writer.close()
        if status.ending.is_set():  # its owner may have been killed; otherwise the last messages are on their way
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def _serve(engine: Built, inbox: SocketInbox, status: LoopStatus, writer: SocketWriter) -> None:
    """The loop. Stats are updated several times a second while busy, and once when it becomes idle."""
    core, residuals = engine.core, engine.residuals
    published_s = 0.0
    idle_published = False

    def publish_stats() -> None:
        nonlocal published_s
        published_s = time.monotonic()
        status.stats = core.scheduler.stats()
        engine.adapters.release()

    def publish_idle() -> None:
        nonlocal idle_published
        if not idle_published:
            idle_published = True
            publish_stats()
            if (heartbeat := status.heartbeat()) is not None:
                writer.send(heartbeat)

    def observe(record: StepRecord) -> None:
        status.step_tokens.append(record.step.num_tokens)
        if log_step is not None:
            log_step(record)

    log_step, core.observer = core.observer, observe
    inbox.idle, inbox.administered = publish_idle, publish_stats
    while not status.ending.is_set():
        outputs = core.step()
        if outputs:
            idle_published = False
            writer.send(Outputs(outputs, status.step_tokens, residuals.take() if residuals is not None else []))
            status.step_tokens = []
        if time.monotonic() - published_s > HEARTBEAT_S:
            publish_stats()


def _send_heartbeats(context: zmq.Context[zmq.Socket[bytes]], folder: Path, status: LoopStatus) -> None:
    writer = SocketWriter(context, folder)
    while not status.ending.wait(HEARTBEAT_S):
        if (heartbeat := status.heartbeat()) is not None:
            writer.send(heartbeat)
    writer.close()


def _end_with_input(status: LoopStatus, folder: Path) -> None:
    """When the API process closes this process's input, or dies, end the loop; if it does not end, end everything."""
    while os.read(0, 4096):  # not sys.stdin: its lock, held here, would break an orderly exit
        pass
    status.ending.set()
    time.sleep(_EXIT_GRACE_S)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _freeze_gc() -> None:
    """Keep the garbage collector from walking through the model's objects at every full collection."""
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    sys.exit(main())
