"""Origins of web pages (RFC 6454) that may use an API, as settings name them."""

from __future__ import annotations

import re

from powerband.errors import UsageError

ANY_ORIGIN = "*"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*+://[^/\s,*?#@]++|null")


def parse_origins(text: str | None) -> frozenset[str]:
    """The origins in a list with commas, or in a JSON list, as vLLM writes it. Raises UsageError."""
    listed = (text or "").strip()
    if listed.startswith("[") and listed.endswith("]"):
        listed = listed[1:-1].replace('"', "").replace("'", "")
    origins = frozenset(origin.strip().lower().rstrip("/") for origin in listed.split(",") if origin.strip())
    for origin in origins - {ANY_ORIGIN}:
        if not _ORIGIN.fullmatch(origin):
            raise UsageError(
                f"allowed_origins has {origin[:100]!r}, which is not the origin of a web page.",
                hint="Write scheme, host and port, such as https://chat.example.com or http://localhost:3000, or *.",
                param="allowed_origins",
            )
    return origins
