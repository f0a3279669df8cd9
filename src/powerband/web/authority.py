"""The authority of a URL: host and port."""

from __future__ import annotations

from powerband.errors import UsageError


def split_authority(authority: str, default_port: int) -> tuple[str, int]:
    """'host:80', '[::1]:80', 'host' → host, port. Raises UsageError."""
    host, sign, port = authority.rpartition(":")
    if not sign or authority.endswith("]"):
        host, port = authority, str(default_port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"'{authority}' is no host and port.", hint="Write it like localhost:8000.", param="url")
    return host, int(port)
