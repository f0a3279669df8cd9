"""Settings of one replica's HTTP API, declared as in spec/settings.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from powerband.spec.settings import check_values, setting
from powerband.web.origins import parse_origins


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of one replica's API. Raises UsageError naming the field when a value is wrong."""

    host: str = setting("127.0.0.1", "Address to listen on; beyond loopback a key is required", group="Server")
    port: int = setting(8000, "Port to listen on; 0: any free port", group="Server", minimum=0, maximum=65535)
    api_key: str | None = setting(
        None, "Key that every request must send as 'Authorization: Bearer KEY'", group="Server"
    )
    api_key_file: str | None = setting(None, "File whose first line is the API key", group="Server")
    insecure: bool = setting(False, "Listen beyond loopback without a key", group="Server")
    drain_timeout_s: float = setting(
        30.0, "Seconds for running requests to finish after SIGTERM", group="Server", minimum=0, maximum=3600
    )
    max_body_bytes: int = setting(4 << 20, "Maximum request body", group="Server", minimum=1024, maximum=256 << 20)
    unknown_fields: Literal["error", "ignore"] = setting(
        "error",
        "Unknown fields of a request. error: refuse the request, naming the field; ignore: go on without them, naming "
        "them in the header X-Ignored-Fields",
        group="Server",
    )
    allowed_origins: str | None = setting(
        None,
        "Origins of web pages that may use the API, separated by commas, such as https://chat.example.com; *: any page",
        group="Server",
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "Minimum level of log lines", group="Server"
    )
    log_format: Literal["text", "json"] = setting("text", "Format of log lines on stderr", group="Server")

    def __post_init__(self) -> None:
        check_values(self)
        parse_origins(self.allowed_origins)
