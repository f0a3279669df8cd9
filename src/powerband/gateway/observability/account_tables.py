"""Keys, usage and the audit log of the admin API's answers as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from powerband.metrics.logging import one_line

_KEY_HEADINGS = ["id", "name", "begins", "scopes", "state", "requests/min", "tokens/min", "at once", "USD", "models"]


def key_rows(keys: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Of GET /admin/keys, with headings."""
    return [_KEY_HEADINGS, *map(_key_row, keys)]


def usage_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Of GET /admin/usage, with headings and, below several rows, their total."""
    total = {**found["total"], "key_name": "total"}
    rows = found["data"] if not found["by"] else [*found["data"], total]
    return [_headings(found["by"]), *(_usage_row(found["by"], row) for row in rows)]


def audit_rows(entries: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Of GET /admin/audit, with headings."""
    columns = ("actor", "action", "what")
    shown = [[str(one["seq"]), _second(one["at"]), *(one_line(one[name]) for name in columns)] for one in entries]
    return [["number", "time", "who", "action", "what"], *shown]


def _key_row(key: dict[str, Any]) -> list[str]:
    limits, used = key["limits"], key["used"]
    spend = f"{used['usd']:.4g}"
    if limits["usd"] is not None:
        spend += f" of {limits['usd']:g} {'a month' if limits['usd_period'] == 'month' else 'in all'}"
    return [
        key["id"],
        key["name"],
        f"{key['prefix']}…",
        ",".join(key["scopes"]),
        _state(key),
        _used_of_limit(used["requests_last_min"], limits["requests_per_min"]),
        _used_of_limit(used["tokens_last_min"], limits["tokens_per_min"]),
        _used_of_limit(used["running"], limits["max_concurrency"]),
        spend,
        ",".join(limits["models"]) or "all",
    ]


def _used_of_limit(used: int, limit: int | None) -> str:
    return f"{used:,}" if limit is None else f"{used:,} of {limit:,}"


def _state(key: dict[str, Any]) -> str:
    if key["revoked_at"] is not None:
        return f"revoked {_minute(key['revoked_at'])}"
    if key["expires_at"] is None:
        return "valid"
    over = key["expires_at"] <= datetime.now(UTC).timestamp()
    return f"{'expired' if over else 'until'} {_minute(key['expires_at'])}"


def _minute(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M")


def _headings(by: list[str]) -> list[str]:
    figures = (
        "requests",
        "errors",
        "refused",
        "prompt",
        "cached",
        "output",
        "reasoning",
        "TTFT p50",
        "p95",
        "USD",
        "score",
    )
    return [*(by or [""]), *figures]


def _usage_row(by: list[str], row: dict[str, Any]) -> list[str]:
    names = [row.get("key_name", "") if name == "key" else row[name] for name in by] or ["all"]
    if row.get("key_name") == "total":
        names[0] = "total"
    cached = row["cached_tokens"] / row["prompt_tokens"] if row["prompt_tokens"] else 0.0
    return [
        *names,
        f"{row['requests']:,}",
        f"{row['errors']:,}",
        f"{row['refused']:,}",
        f"{row['prompt_tokens']:,}",
        f"{cached:.0%}",
        f"{row['output_tokens']:,}",
        f"{row.get('reasoning_tokens', 0):,}",
        _seconds(row["ttft_p50_s"]),
        _seconds(row["ttft_p95_s"]),
        f"{row['cost_usd']:.4f}",
        "–" if row["score"] is None else f"{row['score']:+.2f} ({row['scored']})",
    ]


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _second(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")
