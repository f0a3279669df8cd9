"""One row per completed request: key, model, tokens, times, cost. Written by a background thread.

Requests that never reached a replica (over a limit, queue full) only count in sums, so that a client which retries
forever cannot fill the disk. While the disk cannot be written, rows wait in memory. When the buffer is full, further
requests only count in sums, too, and `dropped` counts them.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
import uuid
from collections import OrderedDict
from operator import add
from typing import NamedTuple

from powerband.gateway.accounts.limits import month_of
from powerband.gateway.accounts.store import BAD_ROW, Row, Run, Store
from powerband.gateway.request import CompletedRequest

logger = logging.getLogger(__name__)

MAX_WAITING = 50_000
MAX_RECENT = 20_000
# A few at a time: nothing else is written during the statement.
_DELETE = "DELETE FROM usage WHERE id IN (SELECT id FROM usage WHERE ended_at < ? LIMIT 5000)"
_INSERT = """
INSERT INTO usage (
    request_id, ended_at, key_id, model, endpoint, prompt_tokens, cached_tokens, output_tokens, queue_s, ttft_s, e2e_s,
    status, outcome, error, replica, cost_usd, requests, estimated, reasoning_tokens
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (request_id) DO NOTHING
"""


class _Group(NamedTuple):
    """Requests that share one sum."""

    hour: int
    key_id: str
    model: str
    endpoint: str
    status: int
    outcome: str
    error: str


class _Sum(NamedTuple):
    ended_at: float  # of the last
    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    cost_usd: float
    estimated: int
    reasoning_tokens: int

    def plus(self, other: _Sum) -> _Sum:
        return _Sum(max(self[0], other[0]), *map(add, self[1:], other[1:]))


class UsageLog:
    def __init__(self, store: Store, retention_days: float, max_waiting: int = MAX_WAITING) -> None:
        self._lock = threading.Lock()  # guards the sums, which the writer's thread takes
        self._sums: dict[_Group, _Sum] = {}
        self._recent: OrderedDict[str, str] = OrderedDict()
        self._retention_s = retention_days * 86400
        self.buffer = store.buffer(_INSERT, max_waiting, on_overflow=self._keep_sums)
        store.add_periodic(self._write_sums)
        store.add_periodic(self._delete_old, every_s=1)

    def note(self, finished: CompletedRequest) -> None:
        """Never blocks, and raises no error of the disk."""
        request, record = finished.request, finished.record
        row = (
            request.id,
            finished.ended_at,
            request.tenant,
            request.model,
            request.endpoint,
            record.prompt_tokens,
            record.cached_tokens,
            record.output_tokens,
            finished.queue_s,
            record.ttft_s,
            record.e2e_s,
            finished.status,
            record.outcome.value,
            finished.error,
            finished.replicas[-1] if finished.replicas else "",
            finished.cost_usd,
            1,
            int(finished.is_estimate),
            finished.reasoning_tokens or 0,
        )
        if not finished.replicas:
            self._keep_sums(row)
            return
        self._recent[request.id] = request.tenant
        if len(self._recent) > MAX_RECENT:
            self._recent.popitem(last=False)
        if not self.buffer.add(row) and self.buffer.dropped % MAX_WAITING == 1:
            logger.error("The buffer of usage rows is full: further requests only count in sums.")

    def key_of(self, request_id: str) -> str | None:
        """The id of the request's key, if it is recent; None: look it up."""
        return self._recent.get(request_id)

    def _keep_sums(self, row: Row) -> None:
        (
            _,
            ended_at,
            key_id,
            model,
            endpoint,
            prompt,
            cached,
            output,
            *_,
            status,
            outcome,
            error,
            _,
            usd,
            count,
            estimated,
            reasoning,
        ) = row
        group = _Group(int(ended_at // 3600), key_id, model, endpoint, status, outcome, error)
        self._add(group, _Sum(ended_at, count, prompt, cached, output, usd, estimated, reasoning))

    def _add(self, group: _Group, amounts: _Sum) -> None:
        with self._lock:
            before = self._sums.get(group)
            self._sums[group] = amounts if before is None else before.plus(amounts)

    def _write_sums(self, run: Run) -> None:
        with self._lock:
            taken, self._sums = self._sums, {}
        if not taken:
            return
        try:
            run(_INSERT, [_as_row(group, amounts) for group, amounts in taken.items()])
        except BAD_ROW as error:
            logger.error("The database rejects a sum: %s.", type(error).__name__)
            self.buffer.dropped += sum(amounts.requests for amounts in taken.values())
        except Exception:
            for group, amounts in taken.items():
                self._add(group, amounts)
            raise

    def _delete_old(self, run: Run) -> None:
        before = (time.time() - self._retention_s) // 86400 * 86400  # whole days only
        run(_DELETE, [(before,)])


def _as_row(group: _Group, amounts: _Sum) -> Row:
    id = f"sum_{uuid.uuid4().hex}"
    tokens = amounts.prompt_tokens, amounts.cached_tokens, amounts.output_tokens
    ends = group.status, group.outcome, group.error, ""
    known = id, amounts.ended_at, group.key_id, group.model, group.endpoint
    counts = amounts.requests, amounts.estimated, amounts.reasoning_tokens
    return (*known, *tokens, 0.0, None, None, *ends, amounts.cost_usd, *counts)


def read_spend(connection: sqlite3.Connection, now: float) -> dict[str, tuple[float, float]]:
    """Key id → (USD in total, USD this month)."""
    sql = "SELECT key_id, sum(cost_usd), sum(CASE WHEN day >= ? THEN cost_usd ELSE 0 END) FROM daily GROUP BY key_id"
    return {id: (total, month) for id, total, month in connection.execute(sql, (f"{month_of(now)}-01",))}
