"""Ending a child process of asyncio, also one that has just exited by itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from powerband.child_process import send_signal


def test_exit_status_is_left_to_asyncio(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """If anything else waits for the child, asyncio warns of an unknown child process and reports 255."""
    polled = []
    poll = subprocess.Popen.poll

    def recorded(self: subprocess.Popen[bytes]) -> Any:
        polled.append(self.pid)
        return poll(self)

    monkeypatch.setattr(subprocess.Popen, "poll", recorded)

    async def end_one_that_exits_by_itself() -> tuple[int, int]:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "raise SystemExit(7)")
        with contextlib.suppress(ChildProcessError):  # the watcher's thread may be the first to see it
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        # It has exited, and the event loop does not know.
        send_signal(process, signal.SIGKILL)
        return process.pid, await process.wait()

    with caplog.at_level(logging.WARNING, "asyncio"):
        pid, code = asyncio.run(end_one_that_exits_by_itself())
    assert (code, caplog.messages) == (7, [])
    assert pid not in polled


def test_running_child_gets_the_signal() -> None:
    async def end_one_that_runs() -> int:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "import time; time.sleep(60)")
        send_signal(process, signal.SIGKILL)
        code = await process.wait()
        send_signal(process, signal.SIGKILL)  # and no error now that it has gone
        return code

    assert asyncio.run(end_one_that_runs()) == -signal.SIGKILL
