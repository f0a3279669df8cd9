"""Progress on stderr, the same for every command that takes long."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_EVERY_S = 2.0


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Callable[[str, float], None]]:
    """A bar during the block; where stderr is no terminal, a line for each new text. Gives a function of a text and the
    fraction that is done.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal and not quiet:
        yield _PlainProgress()
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TimeElapsedColumn(), BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=quiet) as shown:
        task = shown.add_task("", total=1.0)
        yield lambda text, fraction: shown.update(task, description=text, completed=fraction)


class _PlainProgress:
    """A line on stderr for each new text, but none in what is soon over, and few where the text changes often."""

    def __init__(self) -> None:
        self._began_s = self._printed_s = time.monotonic()
        self._text = ""

    def __call__(self, text: str, _fraction: float) -> None:
        now_s = time.monotonic()
        if text != self._text and now_s - self._printed_s >= PLAIN_EVERY_S:
            self._text, self._printed_s = text, now_s
            print(f"· {now_s - self._began_s:.0f} s: {text}", file=sys.stderr, flush=True)
