"""Ends child processes of asyncio without its warning "Unknown child process pid …, will report returncode 255"."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress


def send_signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Without effect if the child has exited.

    Process.send_signal() asks subprocess.Popen whether the child has exited, which takes its exit status away from
    asyncio's child watcher: the watcher then warns and reports 255. Python 3.13
    mended it: https://github.com/python/cpython/issues/87744.
    """
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
