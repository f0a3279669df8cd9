"""Powerband's engine core in this process, for worker.py."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from powerband.core.clock import MonotonicClock
from powerband.core.loop import Abort, Add, Command
from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.engine.build import build_engine
from powerband.spec.settings import EngineSettings


class Powerband:
    def __init__(self, job: dict[str, Any]) -> None:
        options: dict[str, Any] = dict(job["options"])
        self.commands: list[Command] = []
        settings = EngineSettings(
            model=job["model"],
            dtype="bfloat16",
            device="cpu",
            threads=job["threads"],
            max_model_len=job["max_len"],
            max_num_seqs=32,
            kv_cache_memory=f"{job['kv_bytes']}B",
            enable_prefix_caching=False,
            **options,
        )
        self._engine = build_engine(settings, inbox=self, clock=MonotonicClock())
        self.versions = {"powerband": version("powerband"), "torch": version("torch")}

    # The engine's inbox: everything is due at once.

    def poll(self, _now: float) -> list[Command]:
        taken, self.commands = self.commands, []
        return taken

    def next_time(self) -> float | None:
        return None

    def wait(self, _until: float | None) -> None:
        """There is nothing to wait for."""

    @property
    def busy(self) -> bool:
        return bool(self.commands) or self._engine.core.busy

    def add(self, id: int, prompt: list[int], max_tokens: int, sampling: dict[str, Any]) -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)
        self.commands.append(Add(EngineRequest(id=str(id), token_ids=prompt, params=params, arrival_s=0.0)))

    def step(self) -> dict[int, int]:
        tokens = {}
        for output in self._engine.core.step():
            if output.error is not None:
                raise RuntimeError(output.error.message)
            if output.token_ids:
                tokens[int(output.id)] = len(output.token_ids)
        return tokens

    def cancel(self, ids: Iterable[int]) -> None:
        self.commands += [Abort(str(id)) for id in ids]


def make(job: dict[str, Any]) -> Powerband:
    return Powerband(job)
