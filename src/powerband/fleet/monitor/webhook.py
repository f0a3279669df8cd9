"""Tells a URL when an incident opens or closes: a POST with JSON, tried again, bounded, from a thread of its own.

What is sent: {"event": "opened" | "closed", "service": …, "text": a sentence, "incident": {…}, "sent_at": …}; `text` is
what chat systems show. An answer of 2xx is taken for received; a redirect is not followed.
"""

from __future__ import annotations

import http.client
import logging
import queue
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import msgspec

from powerband.errors import UsageError
from powerband.fleet.monitor.incidents import Change, Incident

logger = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
_BACKOFF_S = (0.0, 1.0, 3.0, 10.0, 30.0)  # before each try
_MAX_QUEUED = 100


class Webhook:
    """`tell` never blocks: what does not fit into the queue, or is not taken after all tries, is logged and dropped.

    Raises UsageError for what is no URL of http or https. sleep: for tests.
    """

    def __init__(self, url: str, *, service: str = "", sleep: Callable[[float], Any] | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        try:
            is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is none
            is_one = False
        if not is_one:
            raise UsageError(
                f"{url!r} is no URL for a webhook.", hint="Like https://example.org/hook.", param="webhook"
            )
        self._url = parts
        self._service = service
        self._ended = threading.Event()
        self._sleep = sleep or self._ended.wait
        self._waiting: queue.Queue[bytes | None] = queue.Queue(_MAX_QUEUED)
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def tell(self, change: Change, incident: Incident) -> None:
        """For Incidents(tell=…)."""
        at = f" at {self._service}" if self._service else ""
        message = {
            "event": change,
            "service": self._service,
            "text": f"Incident {incident.id}{at} {change}: {incident.what}",
            "incident": asdict(incident),
            "sent_at": time.time(),
        }
        try:
            self._waiting.put_nowait(msgspec.json.encode(message))
        except queue.Full:
            logger.warning("The webhook is too slow: it is not told that %s was %s.", incident.id, change)

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what waits, as far as that goes without waiting between tries."""
        self._ended.set()
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (body := self._waiting.get()) is not None:
            self._send(body)

    def _send(self, body: bytes) -> None:
        problem = ""
        for pause_s in _BACKOFF_S:
            if pause_s and (self._ended.is_set() or self._sleep(pause_s)):
                break
            try:
                problem = self._try(body)
            except (OSError, http.client.HTTPException) as error:
                problem = str(error) or type(error).__name__
            if not problem:
                return
        logger.warning("The webhook did not take a message: %s.", problem)

    def _try(self, body: bytes) -> str:
        """What was wrong with the answer, or ''."""
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._url.hostname or "", self._url.port, timeout=_TIMEOUT_S)
        path = urllib.parse.urlunsplit(("", "", self._url.path or "/", self._url.query, ""))
        headers = {"Content-Type": "application/json", "User-Agent": "powerband"}
        try:
            connection.request("POST", path, body, headers)
            status = connection.getresponse().status
        finally:
            connection.close()
        return "" if 200 <= status < 300 else f"it answered {status}"
