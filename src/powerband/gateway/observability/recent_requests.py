"""The last completed requests, numbered, for the monitor."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from powerband.gateway.request import CompletedRequest

MAX_REQUESTS = 20_000
MAX_CHUNKS = 2_000_000  # times of chunks in all of them: about 64 MB
MAX_PAGE = 1000
MAX_PAGE_CHUNKS = 100_000


class RecentRequests:
    def __init__(self) -> None:
        self._requests: deque[CompletedRequest] = deque()
        self._chunks = 0
        self._last = 0

    @property
    def last(self) -> int:
        """The number of the newest; 0: none yet."""
        return self._last

    def append(self, finished: CompletedRequest) -> None:
        """Add a request, and set its number."""
        self._last += 1
        finished.sequence = self._last
        self._requests.append(finished)
        self._chunks += len(finished.record.chunk_times_s)
        while len(self._requests) > MAX_REQUESTS or self._chunks > MAX_CHUNKS:
            self._chunks -= len(self._requests.popleft().record.chunk_times_s)

    def after(self, number: int) -> list[CompletedRequest]:
        """Requests that completed after this number, oldest first, at most one page."""
        found: list[CompletedRequest] = []
        chunks = 0
        for finished in self._newer(number):
            chunks += len(finished.record.chunk_times_s)
            if found and (len(found) >= MAX_PAGE or chunks > MAX_PAGE_CHUNKS):
                break
            found.append(finished)
        return found

    def _newer(self, number: int) -> Iterator[CompletedRequest]:
        first = self._last - len(self._requests) + 1
        for place in range(max(0, number + 1 - first), len(self._requests)):
            yield self._requests[place]
