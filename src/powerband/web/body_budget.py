"""How many bytes of request bodies a server holds at once, all clients together."""

from __future__ import annotations

from typing import Protocol

from powerband.web.errors import HttpError

BODIES_AT_ONCE = 64  # of the largest size that is allowed
SMALL_BYTES = 64 << 10


class BudgetHolder(Protocol):
    """A request."""

    def refuse(self, error: HttpError) -> None:
        """End it with this error, and drop its body."""


class BodyBudget:
    """Counts the received bytes of each body until its request has ended.

    When the sum exceeds `max_bytes`, the body that started first among the incomplete ones is refused: normal bodies
    arrive within moments, so slow ones go first and block no other request. When all are complete, the new one is
    refused, unless it is small: the queue bounds the number of complete requests.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._coming: dict[BudgetHolder, int] = {}  # in the order in which they started
        self._whole: dict[BudgetHolder, int] = {}

    def add(self, holder: BudgetHolder, size: int) -> None:
        """Count `size` more bytes of its body."""
        self._coming[holder] = self._coming.get(holder, 0) + size
        self.held_bytes += size
        while self.held_bytes > self.max_bytes:
            oldest = next(iter(self._coming))
            if oldest is holder and self._coming[holder] <= SMALL_BYTES:
                break
            self.release(oldest)
            oldest.refuse(_too_many_bytes(self.max_bytes))
            if oldest is holder:
                break

    def complete(self, holder: BudgetHolder) -> None:
        """Its body is whole."""
        if holder in self._coming:
            self._whole[holder] = self._coming.pop(holder)

    def release(self, holder: BudgetHolder) -> None:
        """It has ended, or its body is not needed."""
        self.held_bytes -= self._coming.pop(holder, 0) + self._whole.pop(holder, 0)


def _too_many_bytes(max_bytes: int) -> HttpError:
    return HttpError(
        503,
        "too_many_bytes",
        f"The bodies of all requests together are larger than {max_bytes} bytes.",
        hint=f"Try again, or raise --max-body-bytes, of which {BODIES_AT_ONCE} may be held.",
    )
