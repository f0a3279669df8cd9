"""Commands that show something once, or again every second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

from cyclopts import Parameter

Watch = Annotated[bool, Parameter(help="Refresh every second, until Ctrl-C", negative="")]
_EVERY_S = 1.0
_CLEAR = "\x1b[H\x1b[J"


def show(text: Callable[[], str], *, watch: bool, clears: bool = True) -> int:
    """clears: clear the terminal before each refresh. Returns 0."""
    while watch:
        print((_CLEAR if clears else "") + text(), flush=True)
        time.sleep(_EVERY_S)
    print(text(), flush=True)
    return 0
