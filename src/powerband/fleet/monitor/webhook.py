"""Notifies a URL when an incident opens or closes: a POST with JSON and a limited number of retries, in its own thread.

The body is {"event": "opened" | "closed", "service": …, "text": a sentence, "incident": {…}, "sent_at": …}; chat
systems show `text`. A response of 2xx confirms receipt; redirects are not followed.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from powerband.errors import UsageError
from powerband.fleet.monitor.incidents import Change, Incident
from powerband.http_client.request import request_sync, split_url

logger = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
_BACKOFF_S = (0.0, 1.0, 3.0, 10.0, 30.0)  # before each attempt
_MAX_QUEUED = 100


class Webhook:
    """Raises UsageError unless the URL is a valid one of http or https. sleep: for tests."""

    def __init__(self, url: str, *, service: str = "", sleep: Callable[[float], Any] | None = None) -> None:
        try:
            split_url(url)
        except ValueError:
            raise UsageError(
                f"Invalid webhook URL {url!r}.", hint="Like https://example.org/hook.", param="webhook"
            ) from None
        self._url = url
        self._service = service
        self._closing = threading.Event()
        self._sleep = sleep or self._closing.wait
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_MAX_QUEUED)
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def notify(self, change: Change, incident: Incident) -> None:
        """Queue a message without blocking. If the queue is full or all attempts fail, it is logged and dropped."""
        service = f" at {self._service}" if self._service else ""
        message = {
            "event": change,
            "service": self._service,
            "text": f"Incident {incident.id}{service} {change}: {incident.what}",
            "incident": asdict(incident),
            "sent_at": time.time(),
        }
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            logger.warning("The webhook is too slow; not notified: %s %s.", incident.id, change)

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is queued, without waiting for retries."""
        self._closing.set()
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (message := self._queue.get()) is not None:
            self._send(message)

    def _send(self, message: dict[str, Any]) -> None:
        problem = ""
        for pause_s in _BACKOFF_S:
            if pause_s and (self._closing.is_set() or self._sleep(pause_s)):
                break
            try:
                status = request_sync("POST", self._url, json=message, timeout_s=_TIMEOUT_S).status
            except (OSError, ValueError) as error:
                problem = str(error) or type(error).__name__
                continue
            if 200 <= status < 300:
                return
            problem = f"it responded with {status}"
        logger.warning("The webhook was not notified: %s.", problem)


class WebhookNotifier:
    """The webhook of a service, whose URL may change or be ''."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._url = ""
        self._webhook: Webhook | None = None

    def set_url(self, url: str) -> None:
        """Set the URL. Waits briefly while the previous webhook sends its queue."""
        if url == self._url:
            return
        self.close()
        self._url = url
        self._webhook = Webhook(url, service=self._service) if url else None

    def notify(self, change: Change, incident: Incident) -> None:
        if self._webhook is not None:
            self._webhook.notify(change, incident)

    def close(self) -> None:
        if self._webhook is not None:
            self._webhook.close()
        self._webhook, self._url = None, ""
