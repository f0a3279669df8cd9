"""Write the Grafana board from the list below: `python scripts/board.py`. A test keeps the file current."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOARD = Path(__file__).resolve().parents[1] / "src/powerband/gateway/boards/grafana.json"
G = "powerband_gateway_"
MODEL = 'model_name=~"$model"'
REPLICA = f'{MODEL},replica=~"$replica"'
RANGE = "[$__rate_interval]"


@dataclass(frozen=True, slots=True)
class Panel:
    """queries: (PromQL, legend). kind: 'timeseries' or 'stat'. width: of 24."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    about: str = ""
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    most: float | None = None  # of the axis


def rate(metric: str, by: str = "model_name", where: str = MODEL) -> str:
    return f"sum by ({by}) (rate({metric}{{{where}}}{RANGE}))"


def tokens(kind: str) -> str:
    return rate(f"{G}tokens_total", where=f'{MODEL},kind="{kind}"')


def quantiles(metric: str, name: str = "") -> tuple[tuple[str, str], ...]:
    buckets = f"sum by (le) (rate({metric}_bucket{{{MODEL}}}{RANGE}))"
    return tuple((f"histogram_quantile({q}, {buckets})", f"{name}p{round(q * 100)}") for q in (0.5, 0.95, 0.99))


def limit(figure: str) -> tuple[str, str]:
    return f'max({G}slo_limit_seconds{{{MODEL},figure="{figure}"}})', "SLO"


def gauge(metric: str, where: str = MODEL, by: str = "model_name") -> str:
    return f"sum by ({by}) ({metric}{{{where}}})"


GOOD = f'sum(rate({G}slo_requests_total{{{MODEL},kept="true"}}{RANGE}))'
KEPT = f"{GOOD} / sum(rate({G}slo_requests_total{{{MODEL}}}{RANGE}))"
PROMISED = f"max({G}promised_attainment{{{MODEL}}})"
ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Promise",
        (
            Panel("SLO attainment", "percentunit", ((KEPT, ""),), "Requests that kept the SLO.", "stat", 4),
            Panel("Promised", "percentunit", ((PROMISED, ""),), kind="stat", width=4),
            Panel("Replicas ready", "none", ((f'sum({G}replica_state{{{MODEL},state="ready"}})', ""),), "", "stat", 4),
            Panel("In flight", "none", ((f"sum({G}in_flight)", ""),), "Requests that are not over.", "stat", 4),
            Panel("Queued", "none", ((f"sum({G}queued{{{MODEL}}})", ""),), "They wait for a place.", "stat", 4),
            Panel(
                "Predicted wait",
                "s",
                ((f"max({G}predicted_wait_seconds{{{MODEL}}})", ""),),
                "Of a request that comes now.",
                "stat",
                4,
            ),
            Panel("Attainment", "percentunit", ((KEPT, "kept"), (PROMISED, "promised")), most=1.0),
            Panel(
                "Burn of the budget of misses",
                "none",
                tuple((f"powerband:slo_burn:{window}{{{MODEL}}}", window) for window in ("1m", "5m", "1h")),
                "1: the promise is just kept. From the rules in alerts.yml.",
            ),
            Panel(
                "Requests and the promised rate",
                "reqps",
                ((rate(f"{G}requests_total"), "requests"), (f"max({G}promised_rate{{{MODEL}}})", "promised")),
            ),
        ),
    ),
    (
        "Latency, as clients see it",
        (
            Panel("TTFT", "s", (*quantiles(f"{G}ttft_seconds"), limit("ttft")), "Arrival to first output token."),
            Panel("TPOT", "s", (*quantiles(f"{G}tpot_seconds"), limit("tpot")), "Mean time per output token."),
            Panel("Stall", "s", (*quantiles(f"{G}stall_seconds"), limit("stall")), "Longest pause within an answer."),
            Panel("E2E", "s", (*quantiles(f"{G}e2e_seconds"), limit("e2e"))),
            Panel("Wait for a place", "s", quantiles(f"{G}queue_seconds")),
            Panel("The gateway's own work", "s", quantiles(f"{G}overhead_seconds"), "Arrival to sent, less the wait."),
        ),
    ),
    (
        "Traffic",
        (
            Panel(
                "Requests by outcome", "reqps", ((rate(f"{G}requests_total", "outcome"), "{{outcome}}"),), stacked=True
            ),
            Panel("Tokens", "short", ((rate(f"{G}tokens_total", "kind"), "{{kind}} per s"),)),
            Panel(
                "Prompts found in caches",
                "percentunit",
                (
                    (
                        f"{tokens('cached')} / {tokens('prompt')}",
                        "{{model_name}}",
                    ),
                ),
                most=1.0,
            ),
            Panel("Refused", "reqps", ((f"sum by (reason) (rate({G}refused_total{RANGE})) > 0", "{{reason}}"),)),
            Panel(
                "Tried again, went on elsewhere, broke off",
                "short",
                (
                    (rate(f"{G}retries_total"), "retries per s"),
                    (rate(f"{G}failovers_total"), "failovers per s"),
                    (rate(f"{G}truncated_total"), "broken off per s"),
                ),
            ),
            Panel("Queue", "short", ((gauge(f"{G}queued"), "requests"), (gauge(f"{G}queued_tokens"), "tokens"))),
        ),
    ),
    (
        "Replicas",
        (
            Panel(
                "State",
                "none",
                ((f"sum by (state) ({G}replica_state{{{REPLICA}}})", "{{state}}"),),
                "How many are in it.",
                stacked=True,
            ),
            Panel("Requests in hand", "short", ((gauge(f"{G}replica_inflight", REPLICA, "replica"), "{{replica}}"),)),
            Panel("Waiting at it", "short", ((gauge(f"{G}replica_waiting", REPLICA, "replica"), "{{replica}}"),)),
            Panel(
                "Share of requests", "reqps", ((rate(f"{G}replica_requests_total", "replica", REPLICA), "{{replica}}"),)
            ),
            Panel("Silent for", "s", ((gauge(f"{G}replica_silent_seconds", REPLICA, "replica"), "{{replica}}"),)),
            Panel(
                "KV cache in use",
                "percentunit",
                (('powerband_kv_cache_usage_ratio{replica=~"$replica"}', "{{replica}}"),),
                most=1.0,
            ),
            Panel(
                "Steps: observed by predicted seconds",
                "none",
                (
                    (
                        f'rate(powerband_step_residual_ratio_sum{{replica=~"$replica"}}{RANGE})'
                        f' / rate(powerband_step_residual_ratio_count{{replica=~"$replica"}}{RANGE})',
                        "{{replica}}",
                    ),
                ),
                "1: the latency model is right. Only calibrated engines tell.",
            ),
            Panel(
                "Put back for want of KV cache",
                "short",
                ((f'rate(powerband_preemptions_total{{replica=~"$replica"}}{RANGE})', "{{replica}} per s"),),
            ),
            Panel(
                "Output tokens",
                "short",
                ((f'rate(powerband_generation_tokens_total{{replica=~"$replica"}}{RANGE})', "{{replica}} per s"),),
            ),
        ),
    ),
    (
        "Keys, usage, and OpenTelemetry's names",
        (
            Panel(
                "Keys rejected", "reqps", ((f"sum by (reason) (rate({G}keys_rejected_total{RANGE}))", "{{reason}}"),)
            ),
            Panel(
                "Rows of usage",
                "short",
                (
                    (f"sum({G}ledger_rows_buffered)", "waiting to be written"),
                    (f"sum(increase({G}ledger_rows_lost_total{RANGE}))", "lost"),
                ),
            ),
            Panel(
                "gen_ai.server.request.duration",
                "s",
                (
                    (
                        "histogram_quantile(0.95, sum by (le, gen_ai_operation_name) "
                        f'(rate(gen_ai_server_request_duration_seconds_bucket{{gen_ai_request_model=~"$model"}}{RANGE})))',
                        "{{gen_ai_operation_name}} p95",
                    ),
                ),
            ),
        ),
    ),
)


def board() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}, "collapsed": False})
        x, y, height = 0, y + 1, 0
        for panel in row:
            if x + panel.width > 24:
                x, y = 0, y + height
            height = 4 if panel.kind == "stat" else 8
            panels.append(_panel(panel, {"x": x, "y": y, "w": panel.width, "h": height}))
            x += panel.width
        y += height
    for number, one in enumerate(panels, 1):
        one["id"] = number
    return {
        "title": "Powerband",
        "uid": "powerband",
        "tags": ["powerband", "llm"],
        "schemaVersion": 39,
        "version": 1,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _variables() -> list[dict[str, Any]]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    found: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    ]
    for name, query in (
        ("model", f"label_values({G}requests_total, model_name)"),
        ("replica", f"label_values({G}replica_state{{{MODEL}}}, replica)"),
    ):
        found.append(
            {
                "name": name,
                "label": name.capitalize(),
                "type": "query",
                "datasource": source,
                "query": {"query": query, "refId": name},
                "refresh": 2,
                "includeAll": True,
                "multi": True,
                "allValue": ".*",
                "current": {"text": "All", "value": "$__all"},
            }
        )
    return found


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "fillOpacity": 30 if panel.stacked else 5,
            "stacking": {"mode": "normal" if panel.stacked else "none"},
            "showPoints": "never",
        }
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "gridPos": place,
        "datasource": source,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
        if panel.kind == "timeseries"
        else {"reduceOptions": {"calcs": ["lastNotNull"]}},
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": source, "expr": query, "legendFormat": legend}
            for number, (query, legend) in enumerate(panel.queries)
        ],
    }


def content() -> str:
    return json.dumps(board(), indent=1) + "\n"


if __name__ == "__main__":
    BOARD.write_text(content(), encoding="utf-8")
