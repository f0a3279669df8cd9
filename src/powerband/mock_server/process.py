"""A mock server in a process of its own, for tests, calibration and benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass

import msgspec

from powerband.bench.client.http import delete, get
from powerband.bench.client.messages import ServerAddress
from powerband.child_process import send_signal
from powerband.errors import EnvironmentFault
from powerband.mock_server.behavior import Behavior, ServerRecord


@dataclass(frozen=True, slots=True)
class MockServerProcess:
    """A mock server in a process of its own."""

    target: ServerAddress
    pid: int

    async def records(self) -> list[ServerRecord]:
        """By arrival. Raises OSError and TimeoutError."""
        return msgspec.json.decode((await get(self.target, "/records", timeout_s=30.0)).body, type=list[ServerRecord])

    async def forget(self) -> None:
        await delete(self.target, "/records")


@contextlib.asynccontextmanager
async def mock_server_process(script: Behavior) -> AsyncIterator[MockServerProcess]:
    """Ends with the block, and with this process. Raises EnvironmentFault when it cannot be started."""
    command = (sys.executable, "-m", "powerband.mock_server.server", "--with-parent", "--script")
    process = await asyncio.create_subprocess_exec(
        *command,
        msgspec.json.encode(asdict(script)).decode(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        address = (await process.stdout.readline()).decode().strip() if process.stdout is not None else ""
        if not address:
            raise EnvironmentFault("The mock server does not start.", code="no_server")
        yield MockServerProcess(ServerAddress(base=address, endpoint="completions", model=script.model), process.pid)
    finally:
        send_signal(process, signal.SIGKILL)
        await process.wait()
