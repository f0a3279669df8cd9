"""Where files are kept for the user: what can be made again (compiled kernels, converted weights, what was measured),
and the state of what was deployed, which cannot."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "POWERBAND_CACHE"


def cache_directory() -> Path:
    """$POWERBAND_CACHE, else powerband/ in the user's cache directory."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    base = os.environ.get("XDG_CACHE_HOME") or _home() / ".cache"
    return Path(base) / "powerband"


def state_home() -> Path:
    """$POWERBAND_STATE, or powerband/ in $XDG_STATE_HOME, or in ~/.local/state."""
    if os.environ.get("POWERBAND_STATE"):
        return Path(os.environ["POWERBAND_STATE"]).absolute()
    base = os.environ.get("XDG_STATE_HOME") or _home() / ".local" / "state"
    return Path(base) / "powerband"


def _home() -> Path:
    """/ for a user without a home, as containers set HOME for users that they do not know."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")
