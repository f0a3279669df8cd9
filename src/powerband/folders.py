"""Where files are kept for the user: what can be made again (compiled kernels, converted weights, what was measured),
and the state of what was deployed, which cannot."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "POWERBAND_CACHE"
STATE_VARIABLE = "POWERBAND_STATE"
WRITABLE_CACHE = f"Set {CACHE_VARIABLE} to a folder that this user can write."
WRITABLE_STATE = f"Set {STATE_VARIABLE} to a folder that this user can write."


def cache_directory() -> Path:
    """$POWERBAND_CACHE, else powerband/ in the user's cache directory."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    base = os.environ.get("XDG_CACHE_HOME") or _home() / ".cache"
    return Path(base) / "powerband"


def state_home() -> Path:
    """$POWERBAND_STATE, or powerband/ in $XDG_STATE_HOME, or in ~/.local/state."""
    if os.environ.get(STATE_VARIABLE):
        return Path(os.environ[STATE_VARIABLE]).absolute()
    base = os.environ.get("XDG_STATE_HOME") or _home() / ".local" / "state"
    return Path(base) / "powerband"


def expand_user(name: str) -> Path:
    """A path whose ~ is the user's home; as it is for a user without one."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _home() -> Path:
    """/ for a user without a home, as containers set HOME for users that they do not know."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")
