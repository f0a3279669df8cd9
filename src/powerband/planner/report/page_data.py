"""What the page of a plan shows, as plain values. Numbers stay numbers: the page sorts, compares and draws them.

    page_data ─► {headline, question, tiles, reasons, slo, rate, budget, percentile, recommended, roles, facts,
                  workload, axes: how the chart begins
                  texts: what many deployments share is said once and meant by its number
                  curves, prices, plan: see `what_if_data`
                  evaluations: [{id, name, group, engine, devices, layout, precision, usd_per_hour, …}], best first
                  pruned: [reason, count, [what, detail, count]]}

Times in seconds, what never ends is null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from powerband.metrics.definitions import DEFINITIONS
from powerband.metrics.shown import digits, plain, share_text
from powerband.planner.report.formatting import (
    BOUND_WORDS,
    banded_seconds,
    brief_seconds,
    deployment_text,
    dollars,
    engine_text,
    price_lines,
)
from powerband.planner.report.json_export import finite
from powerband.planner.report.table import (
    LATENCIES,
    detail_text,
    devices_text,
    headline,
    layout_code,
    layout_lines,
    limits_code,
    percentile_text,
    plan_request,
    precisions_text,
    pruned_by_reason,
    share_band_text,
)
from powerband.planner.report.what_if_data import WhatIfData, plan_data
from powerband.planner.results import Evaluation, PlanResults, Prediction
from powerband.spec.quantities import count_text
from powerband.spec.slo import SLO

MAX_PRUNED = 200  # of one reason, that are named
_DEFINED = ("TTFT", "TPOT", "E2E", "SLO attainment")


def page_data(results: PlanResults, command: Sequence[str] = ()) -> dict[str, Any]:
    """command: that made the plan."""
    texts: dict[str, int] = {}
    what_if = WhatIfData(lambda text: texts.setdefault(text, len(texts)), results.price_origins)
    evaluations = [_evaluation(one, texts) | what_if.of(one) for one in results.evaluations]
    numbers = {id(one): number for number, one in enumerate(results.evaluations)}
    roles = {name: numbers[id(one)] for name, one in results.alternatives.items() if id(one) in numbers}
    chosen = results.recommended
    return {
        "headline": headline(results),
        "question": plan_request(results),
        "tiles": _tiles(chosen or results.alternatives.get("nearest"), results),
        "reasons": [plain(reason) for reason in results.reasons],
        "slo": {"limits": results.slo.limits, "attainment": results.slo.attainment},
        "rate": results.rate,
        "budget": results.budget_usd_per_hour,
        "percentile": percentile_text(results.slo),
        "recommended": numbers.get(id(chosen)),
        "roles": roles,
        "axes": _axes(results),
        "facts": _facts(results),
        "workload": results.workload,
        "evaluations": evaluations,
        "curves": what_if.curves,
        "prices": what_if.prices,
        "plan": plan_data(results, command),
        "texts": list(texts),
        "pruned": [
            (
                plain(reason),
                sum(one.count for one in members),
                [(plain(one.what), plain(detail_text(one.reason, reason)), one.count) for one in members[:MAX_PRUNED]],
            )
            for reason, members in pruned_by_reason(results.pruned)
        ],
        "definitions": [(one.name, one.formula, one.note) for one in DEFINITIONS if one.name in _DEFINED],
    }


def _evaluation(one: Evaluation, texts: dict[str, int]) -> dict[str, Any]:
    def number(text: str) -> int:
        return texts.setdefault(text, len(texts))

    pools = one.deployment.pools
    devices = dict.fromkeys(pool.replica.device for pool in pools)
    return {
        "name": deployment_text(one.deployment),
        "group": plain(" + ".join(devices)),
        "engine": engine_text(one.deployment),
        "precision": precisions_text(one.deployment),
        "devices": one.deployment.num_devices,
        "devices_text": plain(devices_text(one.deployment)),
        "layout": layout_code(one.deployment),
        "limits": limits_code(one.deployment),
        "setting": [number(plain(line)) for text in layout_lines(one.deployment) for line in text.split("\n")],
        "usd_per_hour": one.usd_per_hour,
        "usd_per_million_tokens": one.usd_per_million_tokens,
        "figures": {name: _banded(figure) for name, figure in one.figures.items()},
        "meets_slo": one.meets_slo,
        "dominated": one.dominated,
        "method": number(one.method),
        "binds": number(BOUND_WORDS[one.binds]),
        "operators": [(number(name), round(share, 4)) for name, share in one.operators.items() if share > 0.0005],
        "kv_tokens": one.kv_tokens,
        "weights_bytes": one.weights_bytes,
        "notes": [number(plain(note)) for note in one.notes],
    }


def _banded(figure: Prediction) -> tuple[float | None, ...] | None:
    """Value, low, high; None: it never ends."""
    value = finite(figure.value)
    return None if value is None else (_short(value), _short(finite(figure.low)), _short(finite(figure.high)))


def _tiles(one: Evaluation | None, results: PlanResults) -> list[tuple[str, str, str]]:
    """(what, how much, a note) for the top of the page."""
    if one is None:
        return []
    slo, p = results.slo, percentile_text(results.slo)
    tiles = [("Cost an hour", dollars(one.usd_per_hour), _price_note(one, results))]
    tiles.append(("Per million tokens", dollars(one.usd_per_million_tokens), f"of output, at {results.rate:.3g}/s"))
    for name, shown in LATENCIES.items():
        figure = one.figures.get(name)
        if figure is not None and (name != "e2e_s" or "e2e" in slo.limits):
            tiles.append((f"{shown} {p}", brief_seconds(figure.value), _latency_note(figure, name, slo)))
    kept, capacity = one.figures.get("attainment"), one.figures.get("capacity")
    if kept is not None and slo.limits:
        within = share_band_text(kept).partition("(")[2].removesuffix(")")
        must = f"{slo.attainment * 100:g} % must"
        tiles.append(("Keep the SLO", share_text(kept.value), f"{within}; {must}" if within else must))
    if capacity is not None:
        within = f"{digits(capacity.low)}–{digits(capacity.high)}; {results.rate:.3g} asked"
        tiles.append(("Holds up to", f"{digits(capacity.value)}/s", within))
    return tiles


def _latency_note(figure: Prediction, name: str, slo: SLO) -> str:
    band = banded_seconds(figure).partition("(")[2].removesuffix(")")
    limit = slo.limits.get(name.removesuffix("_s"))
    return f"{band}; limit {brief_seconds(limit)}" if limit is not None else band


def _price_note(one: Evaluation, results: PlanResults) -> str:
    """Where the price comes from, and the budget."""
    budget = results.budget_usd_per_hour
    limit = f"budget {dollars(budget)}" if budget is not None else "no budget was set"
    return "; ".join([*price_lines(one.machines, results.price_origins), limit])


def _axes(results: PlanResults) -> tuple[str, str]:
    """What the chart shows first: the price, where one is known, and the latency that is limited."""
    has_prices = any(one.usd_per_hour is not None for one in results.evaluations)
    if results.objective == "throughput":
        return ("usd_per_hour" if has_prices else "devices"), "capacity"
    limited = [f"{name}_s" for name in results.slo.limits if f"{name}_s" in LATENCIES]
    return ("usd_per_hour" if has_prices else "devices"), (limited or ["ttft_s"])[0]


def _facts(results: PlanResults) -> list[tuple[str, str]]:
    simulated = sum(one.method == "simulation" for one in results.evaluations)
    slo = results.slo
    return [
        ("Model", plain(results.model)),
        ("Load", f"{results.rate:.3g} {results.unit} of {plain(str(results.workload.get('name', 'a workload')))}"),
        ("SLO", f"{slo} for {slo.attainment * 100:g} % of requests" if slo.limits else "none"),
        *([("Cut", results.cut)] if results.cut else []),
        ("Objective", results.objective),
        (
            "Looked at",
            f"{count_text(len(results.evaluations), 'deployment')}, {simulated:,} of them simulated, in "
            f"{results.seconds:.3g} s",
        ),
    ]


def _short(value: float | None) -> float | None:
    """Six digits that count: what the page rounds to three is then what a table would."""
    return None if value is None else float(f"{value:.6g}")
