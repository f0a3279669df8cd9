"""Whole engines for tests: settings in, token ids out, through EngineCore."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from powerband.core.clock import MonotonicClock
from powerband.core.loop import Add, Command
from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.step import TokenOutput
from powerband.engine.build import Engine, build_engine
from powerband.engine.executor.local import Progress
from powerband.spec.settings import EngineSettings

SMALL: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "block_size": 8,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "max_model_len": 512,
    "kv_cache_memory": "2MiB",
    "weight_cache": "off",
}


class ListInbox:
    """Commands that a test puts there, all due at once."""

    def __init__(self) -> None:
        self.commands: list[Command] = []

    def poll(self, now: float) -> list[Command]:
        taken, self.commands = self.commands, []
        return taken

    def next_time(self) -> float | None:
        return None

    def wait(self, until: float | None) -> None:
        raise AssertionError("the engine waits although the test expects it to be busy")


class TestEngine:
    """A built engine with a list for an inbox."""

    __test__ = False

    def __init__(self, folder: Path | str, *, progress: Progress | None = None, **settings: Any) -> None:
        self.inbox = ListInbox()
        asked = EngineSettings(model=str(folder), **{**SMALL, **settings})
        self.engine: Engine = build_engine(asked, inbox=self.inbox, clock=MonotonicClock(), progress=progress)
        self._count = 0

    def __enter__(self) -> TestEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def add(self, prompt: Sequence[int], *, adapter: str | None = None, **params: Any) -> str:
        """adapter: its name."""
        self._count += 1
        id = f"r{self._count}"
        asked = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **params})
        digests = {info.name: info.digest for info in self.engine.adapters.infos()}
        digest = digests[adapter] if adapter is not None else ""
        request = EngineRequest(id=id, token_ids=list(prompt), params=asked, arrival_s=0.0, adapter=digest)
        self.inbox.commands.append(Add(request))
        return id

    def run(self) -> dict[str, list[TokenOutput]]:
        """Step until nothing is left to do; the outputs of each request."""
        outputs: dict[str, list[TokenOutput]] = {}
        while self.inbox.commands or self.engine.core.busy:
            for output in self.engine.core.step():
                outputs.setdefault(output.id, []).append(output)
        return outputs

    def generate(
        self, prompts: Sequence[Sequence[int]], *, adapters: Sequence[str | None] | None = None, **params: Any
    ) -> list[list[int]]:
        """All prompts at once → the output tokens of each; adapters: one for each prompt. Fails when one fails."""
        chosen = adapters or [None] * len(prompts)
        ids = [self.add(prompt, adapter=name, **params) for prompt, name in zip(prompts, chosen, strict=True)]
        outputs = self.run()
        for id in ids:
            assert outputs[id][-1].error is None, outputs[id][-1].error
        return [[token for output in outputs[id] for token in output.token_ids] for id in ids]
