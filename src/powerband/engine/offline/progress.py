"""How far a batch of prompts is, on stderr."""

from __future__ import annotations

import time
from types import TracebackType


class ProgressBar:
    """Answers done, and tokens per second in and out so far. Shows nothing when `shown` is false."""

    def __init__(self, num_answers: int, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("Answers"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._task = self._bar.add_task("answers", total=num_answers, speed="")
        self._start_s = time.monotonic()
        self._tokens_in = 0
        self._tokens_out = 0

    def __enter__(self) -> ProgressBar:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def advance(self, *, finished: int, tokens_in: int, tokens_out: int) -> None:
        """Add what one step has brought."""
        self._tokens_in += tokens_in
        self._tokens_out += tokens_out
        seconds = max(time.monotonic() - self._start_s, 1e-9)
        speed = f"{self._tokens_in / seconds:.0f} tokens/s in, {self._tokens_out / seconds:.0f} out"
        self._bar.update(self._task, advance=finished, speed=speed)
