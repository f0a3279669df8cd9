"""The account database: keys, limits, usage, audit log, feedback and transcripts of one gateway."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request

from powerband.errors import EnvironmentFault
from powerband.files import write_atomically
from powerband.gateway.accounts.audit import Audit, ChainHead
from powerband.gateway.accounts.feedback import Feedback
from powerband.gateway.accounts.keys import SCOPES, Key, Keys
from powerband.gateway.accounts.limits import Limits
from powerband.gateway.accounts.responses import ResponseStore
from powerband.gateway.accounts.store import Store
from powerband.gateway.accounts.transcripts import TranscriptStore
from powerband.gateway.accounts.usage_log import UsageLog, read_spend
from powerband.gateway.options import RetentionOptions

logger = logging.getLogger(__name__)
_CLAIMED_CHARS = 60
_SAVED_S = 5.0


def has_admin_key(file: Path) -> bool:
    """Whether the file holds a key: a full disk may have left it empty."""
    return file.exists() and file.stat().st_size > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountStats:
    """For metrics."""

    keys_rejected: int  # requests with a wrong key
    usage_waiting: int  # rows
    usage_written: int
    usage_dropped: int  # rows whose details were lost; they still count in the sums
    content_dropped: int
    failing_s: float  # since when the database cannot be written; 0: it can


class Accounts:
    """One per gateway process; everything but `close` belongs to the event loop's thread."""

    def __init__(
        self,
        store: Store,
        options: RetentionOptions,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.options = options
        self.keys = Keys(store, wall)
        self.limits = Limits(store.read(lambda connection: read_spend(connection, wall())), monotonic, wall)
        self.usage_log = UsageLog(store, options.usage_retention_days)
        self.feedback = Feedback(store, self.usage_log, options.usage_retention_days)
        kept = options.store_content, options.content_retention_days
        self.content = TranscriptStore(store, *kept, redacts=options.redact_content)
        self.responses = ResponseStore(store, *kept, redacts=options.redact_content)
        self._audit = Audit(store, wall)

    @classmethod
    def open(cls, path: Path, options: RetentionOptions | None = None) -> Accounts:
        """Raises EnvironmentFault when the file cannot be used, or another process has it open."""
        return cls(Store(path), options or RetentionOptions())

    def make_admin_key(self, file: Path, name: str) -> None:
        """Create a key with all scopes, in a file that only this user can read.

        Raises EnvironmentFault; then neither the file nor the key exists.
        """
        key, secret = self.keys.create(name, SCOPES)
        try:
            write_atomically(file, f"{secret}\n".encode(), private=True)
            self.store.flush().result(_SAVED_S)
        except (OSError, TimeoutError) as problem:
            file.unlink(missing_ok=True)
            self.keys.revoke(key.id)
            why = getattr(problem, "strerror", "") or "the database cannot be written"
            raise EnvironmentFault(f"Cannot store the admin key in {file}: {why}.", hint="Is the disk full?") from None
        logger.info("Created an admin key in %s.", file)

    def audit(self, actor: str, action: str, what: Mapping[str, Any]) -> None:
        """Record what an administrator did. what: plain values, no secrets. Raises StoreUnavailable."""
        self._audit.note(actor, action, what)

    @property
    def audit_head(self) -> ChainHead:
        """The last entry of the audit log that is known to be on disk."""
        return self._audit.head

    def figures(self) -> AccountStats:
        buffer, failing_since = self.usage_log.buffer, self.store.failing_since
        return AccountStats(
            keys_rejected=self.keys.rejected,
            usage_waiting=len(buffer.rows),
            usage_written=buffer.written,
            usage_dropped=buffer.dropped,
            content_dropped=self.content.buffer.dropped + self.responses.buffer.dropped,
            failing_s=0.0 if failing_since is None else max(0.0, time.time() - failing_since),
        )

    def close(self, timeout_s: float = 5.0) -> None:
        """Write buffered rows, for at most about `timeout_s`. Blocks."""
        self.store.close(timeout_s)


def actor_of(request: Request) -> str:
    """The client's name in the audit log: its key, and the unverified header X-Powerband-Actor."""
    key: Key | None = request.state.key
    claimed = "".join(one for one in request.headers.get("x-powerband-actor", "")[:_CLAIMED_CHARS] if one.isprintable())
    return f"{key.name if key else 'local'}{f' as {claimed!r}' if claimed else ''}{f' ({key.id})' if key else ''}"
