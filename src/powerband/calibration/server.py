"""A model in its real serving form for a while: the server's process, loads over HTTP, and the engine's step log.

async with calibration_server("demo", {"max_num_seqs": 16}, folder) as served:
    load = await served.load(workload.draw(0, duration_s=20))
served.steps()
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import yaml

from powerband.bench.client.http import get
from powerband.bench.client.messages import ServerAddress
from powerband.bench.client.probe import calibrate_prompt_words, find_server
from powerband.bench.load import Live, LoadOptions, LoadResult, run_load
from powerband.child_process import send_signal
from powerband.cost.step_log import StepLogRun, read_step_log
from powerband.errors import EnvironmentFault
from powerband.spec.workload.arrivals import ClosedLoop
from powerband.spec.workload.lengths import Fixed
from powerband.spec.workload.schedule import Schedule
from powerband.spec.workload.workload import RequestMix, Workload
from powerband.web.listening import free_port

START_S = 300.0
_STOP_S = 20.0
_TOUCHING = 1000  # tokens at a time
_LOG_NAME, _STEPS_NAME, _SETTINGS_NAME = "server.log", "steps.jsonl", "settings.yaml"


@dataclass(frozen=True, slots=True)
class ServedLoad:
    """start_s: of the schedule, on the machine's monotonic clock, which the step log's times are on, too."""

    result: LoadResult
    start_s: float


class CalibrationServer:
    """A server that has started, and everything it noted."""

    def __init__(self, target: ServerAddress, folder: Path) -> None:
        self.target = target
        self._folder = folder

    async def load(self, schedule: Schedule, *, timeout_s: float = 600.0, drain_s: float = 600.0) -> ServedLoad:
        """Send it, with texts that the server has not seen. Raises as run_load does."""
        started = 0.0

        def watch(live: Live) -> None:
            nonlocal started
            started = live.start_at

        target = msgspec.structs.replace(self.target, salt=f"{time.time_ns()} ")
        options = LoadOptions(timeout_s=timeout_s, drain_s=drain_s)
        result = await run_load(target, schedule, options, watch=watch)
        return ServedLoad(result, started)

    async def touch(self, kv_tokens: int, seconds: float) -> None:
        """Fill the KV cache once, as far as `seconds` go: memory that was never written to is slow to write to."""
        each = min(_TOUCHING, kv_tokens)
        mix = RequestMix(Fixed(each), Fixed(1))
        workload = Workload(name="touch", arrivals=ClosedLoop(4), requests=mix)
        await self.load(workload.draw(0, duration_s=seconds, num_requests=-(-kv_tokens // each) + 4))

    def steps(self) -> list[StepLogRun]:
        """What the engine noted. Complete only once the server has ended."""
        return read_step_log(self._folder / _STEPS_NAME)


@contextlib.asynccontextmanager
async def calibration_server(
    model: str, settings: Mapping[str, object], folder: Path
) -> AsyncIterator[CalibrationServer]:
    """Start `powerband serve` on a free port of the loopback, and end it afterwards.

    settings: of EngineSettings by name, beside the model. Raises EnvironmentFault with the end of the server's log when
    it does not start.
    """
    port = free_port()
    options = {**settings, "port": port, "log_level": "warning", "step_log": str(folder / _STEPS_NAME)}
    (folder / _SETTINGS_NAME).write_text(yaml.safe_dump(options))
    command = [sys.executable, "-m", "powerband", "serve", model, f"--config={folder / _SETTINGS_NAME}"]
    log = folder / _LOG_NAME
    with log.open("wb") as output:
        # A group of its own: Ctrl-C is for this process, which then ends the server.
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
        )
    try:
        yield CalibrationServer(await _ready(process, port, log), folder)
    finally:
        await _stop(process)


async def _ready(process: asyncio.subprocess.Process, port: int, log: Path) -> ServerAddress:
    """The target, once it answers and its words are measured."""
    asked = ServerAddress(base=f"http://127.0.0.1:{port}", endpoint="completions", model="")
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        if process.returncode is not None:
            break
        with contextlib.suppress(OSError, TimeoutError):
            if (await get(asked, "/readyz")).status == 200:
                return await calibrate_prompt_words((await find_server(asked))[0])
        await asyncio.sleep(0.2)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
    raise EnvironmentFault(
        f"The server did not start.\n{tail}", hint="Try 'powerband serve' with the same model and settings."
    )


async def _stop(process: asyncio.subprocess.Process) -> None:
    send_signal(process, signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), _STOP_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
