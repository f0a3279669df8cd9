"""Limits the memory for request bodies, over all clients of a server."""

from __future__ import annotations

from typing import Protocol

from powerband.web.errors import HttpError

BODIES_AT_ONCE = 64  # the budget is this many bodies of the maximum size
SMALL_BYTES = 64 << 10


class BudgetHolder(Protocol):
    """A request whose body counts against the budget."""

    def refuse(self, error: HttpError) -> None:
        """End the request with this error, and drop its body."""


class BodyBudget:
    """Counts the bytes of each body until its request has ended, by owner: the client's address, later its key.

    An owner may hold half of `max_bytes`. If the budget is exceeded, one of the bodies still arriving is rejected: of
    the owner that holds the most, the body that has been arriving for longest, since honest clients send theirs
    quickly. If all other bodies are complete, that is the new one, unless it is small. The queue limits the number of
    complete requests.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._held: dict[str, int] = {}  # by owner
        self._owners: dict[BudgetHolder, str] = {}
        self._arriving: dict[BudgetHolder, int] = {}  # bytes received; oldest first
        self._complete: dict[BudgetHolder, int] = {}  # bytes kept

    def add(self, holder: BudgetHolder, size: int, owner: str = "") -> None:
        """A part of the body has arrived."""
        self._owners[holder] = owner
        self._arriving[holder] = self._arriving.get(holder, 0) + size
        self._count(owner, size)
        while holder in self._arriving and (over := self._over_budget(owner)) is not None:
            refused = next((one for one in self._arriving if self._owners[one] == over), holder)
            if refused is holder and self._arriving[holder] <= SMALL_BYTES:
                break
            self.release(refused)
            refused.refuse(_too_many_bytes(self.max_bytes))

    def complete(self, holder: BudgetHolder) -> None:
        """The body is complete."""
        if holder in self._arriving:
            self._complete[holder] = self._arriving.pop(holder)

    def keep(self, holder: BudgetHolder, size: int, owner: str) -> None:
        """`size` bytes are kept of the complete body, or instead of it, and count for this owner.

        Raises HttpError 503 if the owner holds too much, or all together, unless the body is small.
        """
        if holder not in self._complete:
            return
        self.release(holder)
        is_full = self.held_bytes + size > self.max_bytes or self._held.get(owner, 0) + size > self.max_bytes // 2
        if is_full and size > SMALL_BYTES:
            raise _too_many_bytes(self.max_bytes)
        self._complete[holder], self._owners[holder] = size, owner
        self._count(owner, size)

    def release(self, holder: BudgetHolder) -> None:
        """The request has ended, or its body is not needed any more."""
        size = self._arriving.pop(holder, 0) + self._complete.pop(holder, 0)
        if (owner := self._owners.pop(holder, None)) is not None:
            self._count(owner, -size)

    def _over_budget(self, owner: str) -> str | None:
        """The owner whose body must be rejected, after more arrived from `owner`; None: none."""
        if self._held.get(owner, 0) > self.max_bytes // 2:
            return owner
        if self.held_bytes <= self.max_bytes:
            return None
        return max({self._owners[one] for one in self._arriving}, key=lambda one: self._held.get(one, 0))

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
