"""One row for every request that is over: who, which model, tokens, times, cost. Written behind the event loop's back.

While the disk cannot be written rows wait in memory. When there is no more room for rows, their sums are still kept,
by day, key and model, and only the details of single requests are lost; `dropped` says how many.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import OrderedDict
from datetime import UTC, datetime
from operator import add

from powerband.gateway.limits import month_of
from powerband.gateway.request import Finished
from powerband.gateway.store import Row, Run, Store
from powerband.metrics.record import Outcome

logger = logging.getLogger(__name__)

_Key = tuple[str, str, str]  # day, key id, model
MOST_WAITING = 50_000
MOST_RECENT = 20_000
_INSERT = """
INSERT INTO usage (
    request_id, ended_at, key_id, model, endpoint, prompt_tokens, cached_tokens, output_tokens, queue_s, ttft_s, e2e_s,
    status, outcome, error, replica, cost_usd
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (request_id) DO NOTHING
"""
_ADD_SUMS = """
INSERT INTO daily VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (day, key_id, model) DO UPDATE SET
    requests = requests + excluded.requests, errors = errors + excluded.errors,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens, cached_tokens = cached_tokens + excluded.cached_tokens,
    output_tokens = output_tokens + excluded.output_tokens, cost_usd = cost_usd + excluded.cost_usd
"""


class Ledger:
    def __init__(self, store: Store, retention_days: float, most_waiting: int = MOST_WAITING) -> None:
        self._lock = threading.Lock()  # over the sums, which the writer's thread takes away
        self._sums: dict[_Key, Row] = {}
        self._recent: OrderedDict[str, str] = OrderedDict()
        self._retention_s = retention_days * 86400
        self.buffer = store.buffer(_INSERT, most_waiting, lose=self._keep_sums)
        store.also(self._write_sums)
        store.also(self._delete_old, every_s=600)

    def note(self, finished: Finished) -> None:
        """Never blocks, never raises for what the disk does."""
        request, record = finished.request, finished.record
        self._recent[request.id] = request.tenant
        if len(self._recent) > MOST_RECENT:
            self._recent.popitem(last=False)
        self.buffer.add(
            (
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
            )
        )

    def key_of(self, request_id: str) -> str | None:
        """Whose request it was, among the latest; None: look it up."""
        return self._recent.get(request_id)

    def _keep_sums(self, row: Row) -> None:
        if self.buffer.dropped == 1:
            logger.error(
                "No more usage rows can wait in memory: from now on only sums per day, key and model are kept."
            )
        key = (datetime.fromtimestamp(row[1], UTC).strftime("%Y-%m-%d"), row[2], row[3])
        self._add(key, (1, row[12] != Outcome.OK.value, *row[5:8], row[15]))

    def _add(self, key: _Key, amounts: Row) -> None:
        with self._lock:
            before = self._sums.get(key, (0,) * 6)
            self._sums[key] = tuple(map(add, before, amounts))

    def _write_sums(self, run: Run) -> None:
        with self._lock:
            taken, self._sums = self._sums, {}
        if not taken:
            return
        try:
            run(_ADD_SUMS, [(*key, *sums) for key, sums in taken.items()])
        except Exception:
            for key, sums in taken.items():
                self._add(key, sums)
            raise

    def _delete_old(self, run: Run) -> None:
        before = (time.time() - self._retention_s) // 86400 * 86400  # whole days: either all of one is here or nothing
        run("DELETE FROM usage WHERE ended_at < ?", [(before,)])


def spent(connection: sqlite3.Connection, now: float) -> dict[str, tuple[float, float]]:
    """Key id → (USD in all, USD in this month)."""
    sql = "SELECT key_id, sum(cost_usd), sum(CASE WHEN day >= ? THEN cost_usd ELSE 0 END) FROM daily GROUP BY key_id"
    return {id: (total, month) for id, total, month in connection.execute(sql, (f"{month_of(now)}-01",))}
