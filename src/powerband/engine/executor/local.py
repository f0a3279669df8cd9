"""An executor in this process: one device, one model runner."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from powerband.core.step import DeviceReport, Step, StepResult
from powerband.engine.runner import ModelRunner
from powerband.errors import UsageError


class TorchExecutor:
    """core.step.Executor over a ModelRunner whose weights are loaded.

    overlap: two steps in flight. A GPU runs beside the caller by itself; on a CPU the steps run in a worker thread, so
    that the caller schedules and updates meanwhile.
    """

    def __init__(
        self,
        runner: ModelRunner,
        report: DeviceReport,
        *,
        init_kv_cache: Callable[[int], None],
        overlap: bool,
    ) -> None:
        self.runner = runner
        self.depth = 2 if overlap else 1
        self.relay = 1 if overlap else 0
        self._report = report
        self._init_kv_cache = init_kv_cache
        threaded = overlap and runner.device.type == "cpu"
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="powerband-steps") if threaded else None

    def start(self) -> DeviceReport:
        return self._report

    def init_kv_cache(self, num_blocks: int) -> None:
        self._init_kv_cache(num_blocks)

    def submit(self, step: Step) -> _Handle:
        if self._worker is not None:
            return _Handle(self._worker.submit(lambda: self.runner.launch(step).result()).result)
        if self.runner.device.type == "cpu":
            return _Handle(lambda: self.runner.launch(step).result())
        return _Handle(self.runner.launch(step).result)

    def call(self, method: str, **kwargs: Any) -> Any:
        raise UsageError(f"This executor has no method {method!r} (called with {', '.join(kwargs) or 'nothing'}).")

    def check(self) -> None:
        """A CPU does not fail; a GPU that has failed says so when it is asked to synchronise."""
        if self.runner.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.runner.device)

    def close(self) -> None:
        """Wait for the steps in flight and end the worker thread."""
        if self._worker is not None:
            self._worker.shutdown(wait=True)


class _Handle:
    def __init__(self, result: Callable[[], StepResult]) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result()
