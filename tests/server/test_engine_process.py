"""The engine's process and its supervisor, with an engine whose model is a rule."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import stat
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zmq

from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.step import FinishReason, TokenOutput
from powerband.engine.client import supervisor
from powerband.engine.client.health import EngineState, HealthMonitor, StallLimits
from powerband.engine.client.supervisor import EngineExit, EngineProcess
from powerband.errors import EngineDead, PowerbandError, UsageError
from powerband.spec.settings import EngineSettings

COMMAND = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))


def request(id: str, max_tokens: int = 5, prompt: list[int] | None = None) -> EngineRequest:
    return EngineRequest(
        id=id, token_ids=prompt or [3, 4, 5], params=SamplingParams(max_tokens=max_tokens), arrival_s=time.monotonic()
    )


@contextlib.asynccontextmanager
async def running(**settings: object) -> AsyncIterator[EngineProcess]:
    engine = EngineProcess(EngineSettings(**settings), command=COMMAND)  # type: ignore[arg-type]
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def outputs_of(engine: EngineProcess, source: EngineRequest) -> list[TokenOutput]:
    stream = engine.submit([source])
    outputs = []
    while more := await stream.take():
        outputs += more
    return outputs


async def until(condition, timeout_s: float = 60.0) -> float:
    """Seconds until the condition holds."""
    start_s = time.monotonic()
    while not condition():
        if time.monotonic() - start_s > timeout_s:
            raise AssertionError("the condition never held")
        await asyncio.sleep(0.01)
    return time.monotonic() - start_s


def test_tokens_arrive_in_order() -> None:
    async def scenario() -> list[int]:
        async with running() as engine:
            return [token for output in await outputs_of(engine, request("a")) for token in output.token_ids]

    assert asyncio.run(scenario()) == [3, 4, 5, 3, 4]


def test_a_refusal_is_the_only_output() -> None:
    async def scenario() -> None:
        async with running() as engine:
            outputs = await outputs_of(engine, request("a", prompt=[1] * 600))
            assert [o.finish_reason for o in outputs] == [FinishReason.ERROR]
            assert outputs[0].error is not None
            assert outputs[0].error.code == "context_length_exceeded"

    asyncio.run(scenario())


def test_closing_early_returns_every_block() -> None:
    async def scenario() -> None:
        async with running(model="long-steps") as engine:
            stream = engine.submit([request(str(i), 400) for i in range(4)])
            await stream.take()
            assert (await engine.call("stats"))["cache"]["num_used"] > 0
            stream.close()
            assert (await engine.call("stats"))["cache"]["num_used"] == 0

    asyncio.run(scenario())


def test_start_up_error_is_the_engines_own() -> None:
    async def scenario() -> None:
        async with running(model="broken"):
            pass

    with pytest.raises(PowerbandError, match="No folder 'broken'") as caught:
        asyncio.run(scenario())
    assert (caught.value.code, caught.value.hint, caught.value.exit_code) == ("model_not_found", "Give a folder.", 3)


def test_death_during_start_up_says_when_and_how() -> None:
    async def scenario() -> None:
        async with running(model="crashing"):
            pass

    with pytest.raises(EngineDead, match=r"ended with status 7 while starting \(weights\)"):
        asyncio.run(scenario())


def test_an_engine_that_cannot_be_run_at_all() -> None:
    engine = EngineProcess(EngineSettings(), command=("/no/such/program",))
    with pytest.raises(EngineDead, match=r"could not be started: .*No such file"):
        asyncio.run(engine.start())


def test_a_long_temporary_folder_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))

    async def scenario() -> None:
        async with running() as engine:
            assert len(await outputs_of(engine, request("a"))) == 5

    asyncio.run(scenario())


def test_killed_engine_ends_streams_and_comes_back() -> None:
    async def scenario() -> None:
        async with running(model="long-steps") as engine:
            stream = engine.submit([request("a", 400)])
            await stream.take()
            os.kill(engine.pid, signal.SIGKILL)
            start_s = time.monotonic()
            while (last := (await stream.take())[-1]).finish_reason is None:
                pass
            assert time.monotonic() - start_s < 20  # the stream takes 40 s
            assert last.error is not None
            assert "SIGKILL" in last.error.message
            assert not engine.health().ready
            with pytest.raises(EngineDead):
                engine.submit([request("b")])
            await until(lambda: engine.health().ready)
            assert engine.num_restarts == 1
            assert len(await outputs_of(engine, request("c"))) == 5

    asyncio.run(scenario())


def test_stopped_engine_is_not_ready_and_recovers() -> None:
    async def scenario() -> None:
        async with running(model="long-steps") as engine:
            stream = engine.submit([request("a", 400)])
            await stream.take()
            os.kill(engine.pid, signal.SIGSTOP)
            assert await until(lambda: engine.health().state is EngineState.STALLED) < 20
            while (last := (await stream.take())[-1]).finish_reason is None:
                pass
            assert last.error is not None
            assert last.error.code == "engine_stalled"
            os.kill(engine.pid, signal.SIGCONT)
            await until(lambda: engine.health().ready)
            assert engine.num_restarts == 0
            assert (await engine.call("stats"))["num_running"] == 0

    asyncio.run(scenario())


def test_without_supervision_nothing_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with running(model="long-steps") as engine:
            stream = engine.submit([request("a", 400)])
            await stream.take()
            monkeypatch.setattr(engine._monitor, "tick", lambda: 1 / 0)
            await until(lambda: not engine.health().ready)
            while (last := (await stream.take())[-1]).finish_reason is None:
                pass
            assert "supervision of the engine failed" in last.error.message

    asyncio.run(scenario())


def test_silence_without_end_is_ended() -> None:
    async def scenario() -> None:
        limits = StallLimits(tick_s=0.05, heartbeat_s=0.5, hopeless_s=1.0)
        engine = EngineProcess(EngineSettings(), command=COMMAND, limits=limits)
        await engine.start()
        first = engine.pid
        os.kill(first, signal.SIGSTOP)
        await until(lambda: engine.pid not in (first, None) and engine.health().ready)
        await engine.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("start_s", "silent_s", "is_hopeless"),
    [(1.0, 4.0, False), (1.0, 6.0, True), (20.0, 6.0, False), (20.0, 21.0, True), (900.0, 61.0, True)],
)
def test_a_silent_engine_is_waited_for_no_longer_than_another_would_take_to_start(
    start_s: float, silent_s: float, is_hopeless: bool
) -> None:
    limits = StallLimits()
    monitor = HealthMonitor(limits)
    monitor.started(start_s)
    for _ in range(int(silent_s / limits.tick_s)):
        monitor.tick()
    assert monitor.hopeless == is_hopeless


def test_a_restart_that_does_not_end_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        engine = EngineProcess(EngineSettings(), command=COMMAND)
        await engine.start()
        first = engine.pid
        command, engine._command = engine._command, (sys.executable, "-c", "import time; time.sleep(60)")
        monkeypatch.setattr(supervisor, "_MIN_RESTART_S", 0.5)
        engine._first_start_s = 0.0
        monkeypatch.setattr(supervisor, "_STOP_GRACE_S", 0.1)
        os.kill(first, signal.SIGKILL)
        await until(lambda: engine.num_restarts == 1)
        engine._command = command
        monkeypatch.setattr(supervisor, "_MIN_RESTART_S", 60.0)
        await until(lambda: engine.health().ready)
        assert engine.num_restarts == 2
        assert engine.last_exit == EngineExit("The engine's process was killed by SIGKILL while serving.", 137)
        await engine.stop()

    asyncio.run(scenario())


def test_a_step_without_end_is_ended_though_its_process_gives_heartbeats() -> None:
    async def scenario() -> None:
        limits = StallLimits(tick_s=0.05, step_s=0.2, hopeless_s=0.6)
        engine = EngineProcess(EngineSettings(model="hanging"), command=COMMAND, limits=limits)
        await engine.start()
        try:
            [output] = await outputs_of(engine, request("a"))
            assert output.error is not None
            assert output.error.code == "engine_stalled"
            await until(lambda: engine.num_restarts == 1 and engine.health().ready)
        finally:
            await engine.stop()

    asyncio.run(scenario())


def test_sockets_are_private_and_bytes_that_are_no_message_are_dropped(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "owned"),))

    async def scenario() -> None:
        async with running() as engine:
            folder = engine._channel.folder
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            context = zmq.Context()
            for name in ("requests.sock", "outputs.sock"):
                assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
                attacker = context.socket(zmq.PUSH)
                attacker.connect(f"ipc://{folder / name}")
                for data in (pickle.dumps(Malicious()), b"", b"\xff" * 1000, b"\x91" * 100_000):
                    attacker.send(data)
            await until(lambda: engine.num_malformed == 4 and engine._monitor._last.num_malformed == 4)
            context.destroy(linger=0)
            assert len(await outputs_of(engine, request("c"))) == 5
        assert not (tmp_path / "owned").exists()
        assert not folder.exists()

    asyncio.run(scenario())


def test_the_engine_ends_when_its_parent_is_gone() -> None:
    async def scenario() -> int:
        engine = EngineProcess(EngineSettings(), command=COMMAND)
        await engine.start()
        process, folder = engine._current.process, engine._channel.folder
        process.stdin.close()  # what the kernel does when the parent is killed
        status = await asyncio.to_thread(process.wait, 60)
        assert not folder.exists()
        await engine.stop()  # sockets that are left to the garbage collector may hang it
        return status

    assert asyncio.run(scenario()) == 0


def test_administration(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with running() as engine:
            await engine.call("pause")
            stream = engine.submit([request("a")])
            assert (await engine.call("stats"))["num_waiting"] == 1
            await engine.call("resume")
            assert await stream.take()
            stream.close()
            with pytest.raises(PowerbandError, match="no method 'explode'"):
                await engine.call("explode")

    asyncio.run(scenario())
    assert UsageError.exit_code == 2


def test_after_an_administrative_call_no_heartbeat_tells_of_the_time_before() -> None:
    async def scenario() -> None:
        heard: list[bool] = []
        engine = EngineProcess(
            EngineSettings(), command=COMMAND, on_heartbeat=lambda heartbeat: heard.append(heartbeat.stats.paused)
        )
        await engine.start()
        try:
            for method, paused in (("pause", True), ("resume", False), ("pause", True)):
                await engine.call(method)
                heard.clear()
                await until(lambda: len(heard) >= 2)
                assert heard == [paused] * len(heard)
        finally:
            await engine.stop()

    asyncio.run(scenario())
