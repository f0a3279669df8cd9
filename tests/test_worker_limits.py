"""A worker's limit is CPU time, so that a busy machine refuses nothing; by the clock it is some times as long."""

from __future__ import annotations

import signal
import subprocess
import sys

from powerband.worker_loop import to_message

LIMIT_S = 0.1
# A request is a number of seconds to wait without computing, or null: compute for ever.
WORKER = f"""
import time
from powerband import worker_loop

def answer(wait_s):
    while wait_s is None:
        pass
    time.sleep(wait_s)
    return {{"waited": wait_s}}

worker_loop.answer_requests(answer, {LIMIT_S})
"""
BUSY_MACHINE = WORKER.replace("\ndef", "worker_loop.WALL_TIME_FACTOR = 1000\n\ndef", 1)


def run(worker: str, *requests: float | None) -> subprocess.CompletedProcess[bytes]:
    data = b"".join(map(to_message, requests))
    return subprocess.run([sys.executable, "-c", worker], input=data, capture_output=True, timeout=60, check=False)


def test_waiting_for_a_core_is_not_counted() -> None:
    waits_s = [2 * LIMIT_S] * 3
    finished = run(BUSY_MACHINE, *waits_s)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == to_message({"waited": waits_s[0]}) * len(waits_s)


def test_an_alarm_ends_what_computes_too_long() -> None:
    assert run(BUSY_MACHINE, None).returncode == -signal.SIGPROF


def test_an_alarm_ends_what_waits_too_long() -> None:
    assert run(WORKER, 60.0).returncode == -signal.SIGALRM
