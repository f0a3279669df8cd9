"""Names in users' files and commands that have changed: the old one works for one release, with a warning."""

from __future__ import annotations

import functools
import logging

_LOG = logging.getLogger("powerband")


@functools.cache
def warn_renamed(old: str, new: str) -> None:
    """Once per name and process, on stderr unless logging is configured otherwise."""
    _LOG.warning("%s is now called %s. The old name works in this release only.", old, new)
