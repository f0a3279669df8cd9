"""How long each phase of an exchange with a replica may take. By itself, so that settings need no network code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds. first_byte_s: from sending to the first byte of the answer's body. between_s: between two of them."""

    connect_s: float = 3.0
    first_byte_s: float = 60.0
    between_s: float = 60.0
    whole_s: float = 3600.0
