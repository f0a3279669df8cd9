"""Requests with a grammar wait outside the loop until it is compiled, so that other requests do not wait for that."""

from __future__ import annotations

import os
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress

from powerband.core.loop import Abort, Add, Command, Inbox
from powerband.structured.compiled import Grammars

_POLL_S = 0.002  # how soon an idle engine sees other commands while a grammar is being compiled
_STACK_BYTES = 64 << 20  # more than the process has that has compiled a stranger's grammar before
_NICENESS = 10


class GrammarInbox:
    """core.loop.Inbox around another one. Belongs to the loop's thread."""

    def __init__(self, inner: Inbox, grammars: Grammars) -> None:
        self._inner = inner
        self._grammars = grammars
        self._thread: ThreadPoolExecutor | None = None
        self._held: dict[str, tuple[Add, Future[None]]] = {}

    def poll(self, now: float) -> list[Command]:
        """What is due; requests when their grammars are compiled. Those that cannot be fail when they run."""
        commands = [command for command in self._inner.poll(now) if not self._holds(command)]
        if self._held:
            ready = [id for id, (_, compiling) in self._held.items() if compiling.done()]
            commands += [self._held.pop(id)[0] for id in ready]
        return commands

    def next_time(self) -> float | None:
        """Something is due soon while a request is held, so that the loop counts as busy."""
        return 0.0 if self._held else self._inner.next_time()

    def wait(self, until: float | None) -> None:
        if self._held:
            wait([compiling for _, compiling in self._held.values()], _POLL_S, FIRST_COMPLETED)
        else:
            self._inner.wait(until)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _holds(self, command: Command) -> bool:
        if isinstance(command, Abort) and command.id in self._held:
            del self._held[command.id]
            return True
        if not isinstance(command, Add):
            return False
        grammar = command.request.params.grammar
        if grammar is None or self._grammars.has(grammar):
            return False
        self._held[command.request.id] = command, self._started_thread().submit(self._grammars.prepare, grammar)
        return True

    def _started_thread(self) -> ThreadPoolExecutor:
        if self._thread is None:
            before = threading.stack_size(_STACK_BYTES)
            try:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars", initializer=_step_back)
                self._thread.submit(int).result()  # it takes its stack now
            finally:
                threading.stack_size(before)
        return self._thread


def _step_back() -> None:
    """Compiling yields to the steps where there are too few cores for both."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
