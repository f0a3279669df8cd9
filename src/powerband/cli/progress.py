"""Progress on stderr, the same for every command that takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Callable[[str, float], None]]:
    """A bar during the block, if stderr is a terminal. Gives a function of a text and the fraction that is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TimeElapsedColumn(), BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as shown:
        task = shown.add_task("", total=1.0)
        yield lambda text, fraction: shown.update(task, description=text, completed=fraction)
