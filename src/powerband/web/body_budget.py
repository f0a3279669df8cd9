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
    """Counts what came of each body, or what is kept of it, until its request has ended; by owner: the client's
    address, and then its key.

    An owner holds half of `max_bytes` at most. When there is no room, the owner that holds the most of those whose
    bodies are coming gives way: the body that has been coming for the longest is refused, since honest ones come in
    moments. That is the new one where all others are whole, unless it is small: how many whole requests there may be is
    bounded by the queue.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._held: dict[str, int] = {}  # by owner
        self._owners: dict[BudgetHolder, str] = {}
        self._coming: dict[BudgetHolder, int] = {}  # the one that began first is first
        self._whole: dict[BudgetHolder, int] = {}

    def add(self, holder: BudgetHolder, size: int, owner: str = "") -> None:
        """More of its body came."""
        self._owners[holder] = owner
        self._coming[holder] = self._coming.get(holder, 0) + size
        self._count(owner, size)
        while holder in self._coming and (debtor := self._debtor(owner)) is not None:
            refused = next((one for one in self._coming if self._owners[one] == debtor), holder)
            if refused is holder and self._coming[holder] <= SMALL_BYTES:
                break
            self.release(refused)
            refused.refuse(_too_many_bytes(self.max_bytes))

    def complete(self, holder: BudgetHolder) -> None:
        """Its body is whole."""
        if holder in self._coming:
            self._whole[holder] = self._coming.pop(holder)

    def keep(self, holder: BudgetHolder, size: int, owner: str) -> None:
        """No more than this is kept of its body, which is whole and belongs to this owner.

        Raises HttpError 503 when the owner holds too much, unless the body is small.
        """
        if holder not in self._whole:
            return
        size = min(size, self._whole[holder])
        self.release(holder)
        if size > SMALL_BYTES and self._held.get(owner, 0) + size > self.max_bytes // 2:
            raise _too_many_bytes(self.max_bytes)
        self._whole[holder], self._owners[holder] = size, owner
        self._count(owner, size)

    def release(self, holder: BudgetHolder) -> None:
        """It has ended, or its body is not needed."""
        size = self._coming.pop(holder, 0) + self._whole.pop(holder, 0)
        if (owner := self._owners.pop(holder, None)) is not None:
            self._count(owner, -size)

    def _debtor(self, owner: str) -> str | None:
        """Who has to give way, now that more came of this owner."""
        if self._held.get(owner, 0) > self.max_bytes // 2:
            return owner
        if self.held_bytes <= self.max_bytes:
            return None
        return max({self._owners[one] for one in self._coming}, key=lambda one: self._held.get(one, 0))

    def _count(self, owner: str, size: int) -> None:
        self.held_bytes += size
        held = self._held[owner] = self._held.get(owner, 0) + size
        if not held:
            del self._held[owner]


def _too_many_bytes(max_bytes: int) -> HttpError:
    return HttpError(
        503,
        "too_many_bytes",
        f"The bodies of all requests together are larger than {max_bytes} bytes, or those of one client than half.",
        hint=f"Try again, or raise --max-body-bytes, of which {BODIES_AT_ONCE} may be held.",
    )
