"""Logging set-up: readable lines on a terminal, JSON lines for machines, always on stderr. Prompts are never logged."""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import IO, Literal

LOGGER_NAME = "powerband"
# What every LogRecord has; anything else came with `extra=` and goes into the JSON line.
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up_logging(
    level: str = "INFO", format: Literal["text", "json"] = "text", stream: IO[str] | None = None
) -> logging.Logger:
    """Send the log of `powerband.*`, and warnings of the libraries, to stderr. The last call counts.

    Modules log with `logging.getLogger(__name__)`, figures with `extra={"seconds": …}`.
    """
    target = stream or sys.stderr
    handler = logging.StreamHandler(target)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter(colour=target.isatty()))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logger = logging.getLogger(LOGGER_NAME)
    logger.setLevel(level.upper())
    return logger


def one_line(text: str) -> str:
    """Unprintable characters as escapes, so that no text can add a line or move the cursor."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class TextFormatter(logging.Formatter):
    """`12:34:56.789 INFO  engine: message`, with the level in colour on a terminal."""

    _COLOURS = {"DEBUG": 2, "INFO": 32, "WARNING": 33, "ERROR": 31, "CRITICAL": 31}  # noqa: RUF012 (a constant)

    def __init__(self, colour: bool = False) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = f"{record.levelname:<7}"
        if self._colour:
            level = f"\x1b[{self._COLOURS.get(record.levelname, 0)}m{level}\x1b[0m"
        room = record.name.removeprefix(f"{LOGGER_NAME}.")
        line = f"{clock}.{int(record.msecs):03d} {level} {room}: {one_line(record.getMessage())}"
        if record.exc_info:
            trace = self.formatException(record.exc_info).splitlines()
            line += "".join(f"\n  | {one_line(part)}" for part in trace)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the fields given with `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD_FIELDS}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
