"""Usage reports: requests, tokens, latency and cost by key, model and day, from the account database.

Whole days (UTC) come from the daily sums, which outlive single requests. The first day, if only a part of it is asked
for, and latencies come from single requests.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from powerband.errors import InvalidRequest

_DAY_S = 86400
_WHOLE_DAYS_BEYOND_S = 7 * _DAY_S
_SQL_OF = {"key": "key_id", "model": "model", "day": "day"}
_TOKENS = ("prompt_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
_SUMS = ("requests", "errors", "refused", "estimated", *_TOKENS, "cost_usd")
_ROWS = "(SELECT *, date(ended_at, 'unixepoch') AS day FROM usage WHERE ended_at >= :since)"


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """A group of requests. A column that is not grouped by is ''."""

    key: str = ""
    model: str = ""
    day: str = ""
    requests: int = 0
    errors: int = 0  # failed or timed out; not those whose client disconnected
    refused: int = 0  # by a limit or a full queue, or invalid
    estimated: int = 0  # requests with tokens that no replica counted; see docs/operating.md
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0  # of the output, as far as replicas count them
    cost_usd: float = 0.0
    ttft_p50_s: float | None = None  # as clients saw it, queueing included
    ttft_p95_s: float | None = None
    score: float | None = None  # mean of the feedback of `scored` requests, -1 (bad) to 1 (good)
    scored: int = 0


def report(connection: sqlite3.Connection, by: Sequence[str], since: float, now: float) -> list[UsageRow]:
    """One row for each group, by cost and then by tokens; a single one when `by` is empty. Raises InvalidRequest.

    since: seconds since 1970; beyond a week ago it means the beginning of that day.
    """
    for name in by:
        if name not in _SQL_OF:
            raise InvalidRequest(f"'by' has {name!r}; known are {', '.join(_SQL_OF)}.", param="by")
    if now - since > _WHOLE_DAYS_BEYOND_S:
        since = max(0.0, since) // _DAY_S * _DAY_S
    group = ", ".join([_SQL_OF[name] for name in by] or ["''"])
    times = {"since": since, "day": _day(since), "whole": since % _DAY_S == 0}
    latencies = _percentiles(connection, group, len(by), times)
    scores = _scores(connection, group, len(by), times)
    rows = []
    for row in _sums(connection, group, times):
        names = row[: len(by)]
        p50, p95 = latencies.get(names, (None, None))
        score, scored = scores.get(names, (None, 0))
        counts = [int(value) for value in row[-len(_SUMS) : -1]]
        values = dict(zip((*by, *_SUMS), [*row[: len(by)], *counts, row[-1]], strict=True))
        rows.append(UsageRow(**values, ttft_p50_s=p50, ttft_p95_s=p95, score=score, scored=scored))
    return sorted(rows, key=lambda row: (row.day, -row.cost_usd, -row.prompt_tokens - row.output_tokens, row.key))


def _sums(connection: sqlite3.Connection, group: str, times: dict[str, object]) -> list[tuple[Any, ...]]:
    tokens = ", ".join(_SUMS[4:])
    sums = ", ".join(f"total({name})" for name in _SUMS)  # unlike sum() it cannot overflow
    sql = (
        f"SELECT {group}, {sums} FROM ("  # noqa: S608 (constants)
        f"SELECT key_id, model, day, requests, errors, refused, estimated, {tokens} FROM daily "
        "WHERE day > :day OR (:whole AND day = :day) "
        "UNION ALL SELECT key_id, model, day, requests, requests * (outcome IN ('error', 'timed_out')), "
        f"requests * (outcome = 'refused'), estimated, {tokens} FROM {_ROWS} "
        f"WHERE NOT :whole AND day = :day) GROUP BY {group}"
    )
    return [row for row in connection.execute(sql, times) if row[-len(_SUMS)]]


def _percentiles(
    connection: sqlite3.Connection, group: str, names: int, times: dict[str, object]
) -> dict[tuple[str, ...], tuple[float, float]]:
    """(p50, p95) of TTFT, linear between neighbours as metrics.record.percentile; SQLite only hands over those."""
    columns = ", ".join(f"{column} AS g{number}" for number, column in enumerate(group.split(", ")))
    groups = ", ".join(f"g{number}" for number in range(max(1, names)))
    sql = (
        f"WITH times AS (SELECT {columns}, ttft_s FROM {_ROWS} WHERE ttft_s IS NOT NULL), "  # noqa: S608 (constants)
        f"sizes AS (SELECT {groups}, count(*) - 1 AS last FROM times GROUP BY {groups}), ordered AS ("
        f"SELECT {groups}, ttft_s, row_number() OVER (PARTITION BY {groups} ORDER BY ttft_s) - 1 AS place FROM times) "
        f"SELECT {groups}, ttft_s, place, last FROM ordered JOIN sizes USING ({groups}) "
        "WHERE abs(place - last * 0.5) < 1 OR abs(place - last * 0.95) < 1"
    )
    found: dict[tuple[str, ...], dict[int, float]] = {}
    lasts: dict[tuple[str, ...], int] = {}
    for row in connection.execute(sql, times):
        group_of = tuple(row[:names])
        found.setdefault(group_of, {})[row[-2]] = row[-3]
        lasts[group_of] = row[-1]
    return {name: (_between(at, lasts[name] * 0.5), _between(at, lasts[name] * 0.95)) for name, at in found.items()}


def _between(at: dict[int, float], place: float) -> float:
    below = math.floor(place)
    return at[below] + (at.get(below + 1, at[below]) - at[below]) * (place - below)


def _scores(
    connection: sqlite3.Connection, group: str, names: int, times: dict[str, object]
) -> dict[tuple[str, ...], tuple[float, int]]:
    given = "(SELECT request_id, score FROM feedback)"
    sql = f"SELECT {group}, avg(score), count(*) FROM {_ROWS} JOIN {given} USING (request_id) GROUP BY {group}"  # noqa: S608 (constants)
    return {tuple(row[:names]): (row[-2], row[-1]) for row in connection.execute(sql, times)}


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")
