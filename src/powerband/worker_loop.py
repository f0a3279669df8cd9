"""What a worker process runs: requests on stdin, answers on stdout, within bounds. See worker_process.py.

Messages are JSON behind a length of four bytes, big-endian.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO


def read_message(stream: BinaryIO) -> Any:
    """The next message; EOFError when the other side is gone."""
    head = stream.read(4)
    if len(head) < 4:
        raise EOFError
    body = stream.read(int.from_bytes(head, "big"))
    return json.loads(body)


def to_message(value: Any) -> bytes:
    body = json.dumps(value).encode()
    return len(body).to_bytes(4, "big") + body


def limit_this_process(memory_bytes: int) -> None:
    """From here on: bounded memory, no files written, no processes started. Kernels that lack a limit go without."""
    for what, bound in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(what, (bound, bound))
        except (ValueError, OSError):
            continue


# A request may take so many times its CPU time: a machine whose cores are busy is no fault of the request.
WALL_TIME_FACTOR = 10
ALARM_SIGNALS = (signal.SIGPROF, signal.SIGALRM)  # of CPU time, and of time by the clock


def answer_requests(answer: Callable[[Any], dict[str, Any]], limit_s: float) -> None:
    """Answer requests until stdin closes. limit_s: CPU time for each.

    A signal ends the process when one takes longer, or `WALL_TIME_FACTOR` times as long by the clock, parent or no
    parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in ALARM_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    while True:
        try:
            request = read_message(sys.stdin.buffer)
        except EOFError:
            return
        _set_alarms(limit_s)
        message = to_message(answer(request))
        sys.stdout.buffer.write(message)
        sys.stdout.buffer.flush()
        _set_alarms(0)


def _set_alarms(cpu_s: float) -> None:
    """0: none."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, cpu_s * WALL_TIME_FACTOR)
