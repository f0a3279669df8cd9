"""A running server for tests: its own process, a free port of loopback, ended by its own pid."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from powerband.engine.process import HEARTBEAT_S

SERVE_FAKE = Path(__file__).with_name("serve_fake.py")


@dataclass
class RunningServer:
    url: str
    process: subprocess.Popen[str]
    http: httpx.Client

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def figure(self, name: str) -> float:
        """One sample of /metrics."""
        line = next(line for line in self.http.get("/metrics").text.splitlines() if line.startswith(name))
        return float(line.rpartition(" ")[2])

    def settled(self, name: str) -> float:
        """A sample that comes with the engine's heartbeats, once two of them have changed nothing."""
        value, since_s = self.figure(name), time.monotonic()
        while time.monotonic() - since_s < 2 * HEARTBEAT_S:
            time.sleep(0.01)
            if (now := self.figure(name)) != value:
                value, since_s = now, time.monotonic()
        return value

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            if b"fake_engine" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
        raise AssertionError("the engine's process is not there")

    def until(self, condition: Any, timeout_s: float = 60.0) -> float:
        """Seconds until `condition()` is true."""
        start_s = time.monotonic()
        while not condition():
            assert time.monotonic() - start_s < timeout_s, "the condition never held"
            time.sleep(0.01)
        return time.monotonic() - start_s


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_server(*arguments: str, command: tuple[str, ...] = (), timeout_s: float = 60) -> Iterator[RunningServer]:
    """`command`: to run instead of the fake; the port is added to it."""
    port = free_port()
    full = [sys.executable, *(command or (str(SERVE_FAKE),)), str(port), *arguments]
    process = subprocess.Popen(full, stderr=subprocess.PIPE, text=True, process_group=0)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=30) as http:
            server = RunningServer(url, process, http)
            server.until(lambda: process.poll() is not None or _ready(http), timeout_s)
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.stderr:
            process.stderr.close()


def _ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False
