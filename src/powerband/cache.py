"""Where what can be made again is kept: compiled kernels, converted weights, what the load generator can do here."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "POWERBAND_CACHE"


def cache_directory() -> Path:
    """$POWERBAND_CACHE, else powerband/ in the user's cache directory."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "powerband"
