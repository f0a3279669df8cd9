"""A plan on a terminal: what is recommended and what it promises, why, then the frontier, and what could not be.

80 columns are enough; a wider terminal shows more of the frontier's columns.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from powerband.metrics.shown import NONE, digits, plain, share_text, time_interval_text
from powerband.planner.report.formatting import (
    NEVER_S,
    banded_seconds,
    brief_seconds,
    deployment_text,
    dollars,
    engine_text,
    precision_text,
    price_lines,
)
from powerband.planner.results import Evaluation, PlanResults, Prediction, Pruned
from powerband.spec.deployment import Deployment, Replica
from powerband.spec.quantities import count_text
from powerband.spec.slo import SLO

MAX_ROWS = 24  # of the frontier
MAX_REASONS = 8  # of what was left out
_AMOUNT = re.compile(r"\d[\d.,]*(?= (?:[GMk]i?B|tokens)\b)")
LATENCIES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "E2E"}


def plan_table(results: PlanResults) -> RenderableType:
    """For a rich Console."""
    parts: list[RenderableType] = [Text(headline(results), style="bold")]
    parts += [Text(plan_request(results), style="dim")]
    if results.cut:
        parts.append(Text(results.cut, style="yellow"))
    parts.append("")
    shown = results.recommended or results.alternatives.get("nearest")
    if shown is not None:
        title = "Promise" if results.recommended else "Prediction"
        parts.append(
            _facts(
                [
                    (title, "\n".join(_promise(shown, results.slo, results.rate, results.unit))),
                    *facts(shown, results.price_origins),
                ]
            )
        )
    if results.reasons:
        parts += ["", _facts([("Why" if results.recommended else "Why not", "\n".join(map(plain, results.reasons)))])]
    if results.frontier:
        parts += ["", *_frontier(results)]
    if results.pruned:
        parts += ["", *_pruned(results.pruned)]
    return Group(*parts)


def headline(results: PlanResults) -> str:
    """The answer in a sentence."""
    chosen, nearest = results.recommended, results.alternatives.get("nearest")
    if chosen is not None:
        known = chosen.usd_per_hour is not None
        price = f" for {dollars(chosen.usd_per_hour)} an hour" if known else " (no price is known)"
        return f"{deployment_text(chosen.deployment)}{price} keeps the SLO."
    within = " within the budget" if results.budget_usd_per_hour is not None else ""
    near = f" Nearest is {deployment_text(nearest.deployment)}." if nearest is not None else ""
    return f"Nothing on offer keeps the SLO{within}.{near}"


def plan_request(results: PlanResults) -> str:
    """What was asked, in a line."""
    parts = [f"{plain(results.model)}, {plain(str(results.workload.get('name', 'a workload')))}"]
    parts[0] += f" at {results.rate:.3g} {results.unit}"
    limits = str(results.slo)
    parts.append(f"{limits} for {results.slo.attainment * 100:g} % of requests" if limits else "no SLO")
    if results.budget_usd_per_hour is not None:
        parts.append(f"at most {dollars(results.budget_usd_per_hour)} an hour")
    searched = f"{count_text(len(results.evaluations), 'deployment')} in {results.seconds:.3g} s"
    return "; ".join([*parts, f"{searched}, for the best {results.objective}"])


def facts(one: Evaluation, origins: Mapping[str, str]) -> list[tuple[str, str]]:
    """What a deployment costs and how it is set up. origins: of prices, see PlanResults."""
    return [
        ("Cost", cost_text(one)),
        *(("Prices", line) for line in price_lines(one.machines, origins)),
        *(("Replicas", text) for text in layout_lines(one.deployment)),
        (
            "Memory",
            f"{one.weights_bytes / 1e9:.3g} GB of weights a device, {one.kv_tokens:,} tokens of KV cache a replica",
        ),
        *(("Note", plain(note)) for note in one.notes),
    ]


def percentile_text(slo: SLO) -> str:
    return f"p{slo.attainment * 100:g}"


def cost_text(one: Evaluation) -> str:
    if one.usd_per_hour is None:
        return "no price is known (--prices or --set DEVICE.price=DOLLARS gives one)"
    return f"{dollars(one.usd_per_hour)} an hour, {dollars(one.usd_per_million_tokens)} per million output tokens"


def layout_lines(deployment: Deployment) -> list[str]:
    """Of each pool: how many replicas of what, and the limits of their schedulers."""
    return [
        f"{pool.count} × {pool.replica.num_devices} {pool.replica.device} (TP {pool.replica.tensor_parallel} × PP "
        f"{pool.replica.pipeline_parallel}), {precision_text(pool.replica)}"
        + (f", prompts up to {pool.max_prompt_tokens:,} tokens" if pool.max_prompt_tokens else "")
        + f"\n{limits_text(pool.replica)}"
        for pool in deployment.pools
    ]


def limits_text(replica: Replica) -> str:
    parts = [
        f"up to {count_text(replica.max_num_seqs, 'request')} and {replica.max_num_batched_tokens:,} tokens a step",
        f"context {replica.max_model_len:,}",
        f"{replica.gpu_memory_utilization:.0%} of memory",
    ]
    if replica.long_prefill_token_threshold:
        parts.append(f"prefill in chunks of {replica.long_prefill_token_threshold:,}")
    if not replica.enable_prefix_caching:
        parts.append("no prefix cache")
    if replica.expert_parallel > 1:
        parts.append("experts divided")
    if replica.offload_share:
        parts.append(f"{replica.offload_share:.0%} of weights in host memory")
    if replica.draft_tokens:
        parts.append(f"{replica.draft_tokens} draft tokens")
    return ", ".join(parts)


def share_band_text(figure: Prediction) -> str:
    """'98.2 % (96.1–99.0 %)'; '100 %' where nothing else is expected."""
    texts = [share_text(share) for share in (figure.value, figure.low, figure.high)]
    value, low, high = texts
    return value if len(set(texts)) == 1 else f"{value} ({low.removesuffix(' %')}–{high})"


def band_text(figure: Prediction) -> str:
    return f"{digits(figure.value)} ({digits(figure.low)}–{digits(figure.high)})"


def _promise(one: Evaluation, slo: SLO, rate: float, unit: str) -> Iterator[str]:
    """Figures with their bands beside what was asked."""
    for name, shown in LATENCIES.items():
        figure, limit = one.figures.get(name), slo.limits.get(name.removesuffix("_s"))
        if figure is not None:
            text = f"{shown} {percentile_text(slo)} {banded_seconds(figure)}"
            yield text + (f" of {brief_seconds(limit)}" if limit is not None else "")
    kept, capacity = one.figures.get("attainment"), one.figures.get("capacity")
    if kept is not None:
        yield f"{share_band_text(kept)} of requests keep the SLO, {slo.attainment * 100:g} % must"
    if capacity is not None:
        yield f"it holds {band_text(capacity)} {unit}, {rate:.3g} are asked"


def _facts(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    before = ""
    for name, text in rows:
        lines = Text(text)
        table.add_row(name if name != before else "", lines)
        before = name
    return table


def _frontier(results: PlanResults) -> Iterator[RenderableType]:
    roles = {id(one): name for name, one in results.alternatives.items()}
    if results.recommended is not None:
        roles[id(results.recommended)] = "chosen"
    frontier = [one for one in results.frontier if id(one) not in roles]
    named = [one for one in results.evaluations if id(one) in roles]
    has_good = any(one.meets_slo for one in results.evaluations)
    rows = [*named, *(one for one in frontier if one.meets_slo or not has_good)][:MAX_ROWS]
    rows.sort(key=lambda one: (one.usd_per_hour is None, one.usd_per_hour or 0.0, one.figures["ttft_s"].value))
    yield Text("Frontier: no other deployment is both cheaper and faster", style="bold")
    yield FrontierTable(tuple(rows), roles, results.slo)
    left = [one for one in frontier if not any(one is row for row in rows)]
    missing = sum(not one.meets_slo for one in left) if has_good else 0
    more = [
        count
        for count in (
            f"{len(left) - missing:,} more" if len(left) > missing else "",
            f"{missing:,} that miss the SLO" if missing else "",
        )
        if count
    ]
    if more:
        yield Text(f"… and {' and '.join(more)} (--html and --json show all)", style="dim")


@dataclass(frozen=True, slots=True)
class FrontierTable:
    """A row each; only the columns for which there is room."""

    rows: tuple[Evaluation, ...]
    roles: dict[int, str]
    slo: SLO

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = self._columns()
        optional = ["by", "low–high", "E2E", "tokens/s", "SLO kept", "holds/s", "$/Mtok", "engine", "limits", ""]
        # What is the same for all need not be said.
        columns = [c for c in columns if c.key not in ("engine", "limits") or len(set(c.cells)) > 1]
        table = self._table(columns)
        whole = options.update(max_width=10_000)
        for heading in optional:
            if Measurement.get(console, whole, table).maximum <= options.max_width:
                break
            columns = [column for column in columns if column.key != heading]
            table = self._table(columns)
        yield table

    def _table(self, columns: Sequence[_Column]) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
        for column in columns:
            table.add_column(column.heading, justify="left" if column.is_text else "right", no_wrap=not column.is_text)
        for number, one in enumerate(self.rows):
            style = "bold" if self.roles.get(id(one)) == "chosen" else "" if one.meets_slo else "dim"
            table.add_row(*(column.cells[number] for column in columns), style=style)
        return table

    def _columns(self) -> list[_Column]:
        rows, p = self.rows, percentile_text(self.slo)
        figures = [one.figures for one in rows]

        def latency(name: str) -> tuple[str, ...]:
            return tuple(brief_seconds(found.value) if (found := f.get(name)) else NONE for f in figures)

        def amount(name: str) -> tuple[str, ...]:
            return tuple(digits(found.value) if (found := f.get(name)) else NONE for f in figures)

        ttft = tuple(_range(f["ttft_s"]) for f in figures)
        kept = tuple(share_text(found.value) if (found := f.get("attainment")) else NONE for f in figures)
        return [
            _Column("", "", tuple(self.roles.get(id(one), "") for one in rows), is_text=True),
            _Column("engine", "engine", tuple(engine_text(one.deployment) for one in rows), is_text=True),
            _Column("devices", "devices", tuple(devices_text(one.deployment) for one in rows), is_text=True),
            _Column("layout", "TP×PP×n", tuple(layout_code(one.deployment) for one in rows), is_text=True),
            _Column("precision", "precision", tuple(precisions_text(one.deployment) for one in rows), is_text=True),
            _Column("limits", "seqs/tokens", tuple(limits_code(one.deployment) for one in rows), is_text=True),
            _Column("$/h", "$/h", tuple(_money(one.usd_per_hour) for one in rows)),
            _Column("$/Mtok", "$/Mtok", tuple(_money(one.usd_per_million_tokens) for one in rows)),
            _Column("TTFT", f"TTFT {p}", latency("ttft_s")),
            _Column("low–high", "low–high", ttft),
            _Column("TPOT", f"TPOT {p}", latency("tpot_s")),
            _Column("E2E", f"E2E {p}", latency("e2e_s")),
            _Column("SLO kept", "SLO kept", kept),
            _Column("holds/s", "holds/s", amount("capacity")),
            _Column("tokens/s", "tokens/s", amount("output_tokens_per_s")),
            _Column("by", "by", tuple(one.method for one in rows), is_text=True),
        ]


@dataclass(frozen=True, slots=True)
class _Column:
    key: str
    heading: str
    cells: tuple[str, ...]
    is_text: bool = False


def devices_text(deployment: Deployment) -> str:
    """'4 L4', '3 L4 + 1 A100-80G'."""
    return " + ".join(f"{pool.num_devices} {pool.replica.device}" for pool in deployment.pools)


def layout_code(deployment: Deployment) -> str:
    """'2×1×4': ranks of tensor and of pipeline parallelism, and replicas."""
    return " + ".join(
        f"{pool.replica.tensor_parallel}×{pool.replica.pipeline_parallel}×{pool.count}" for pool in deployment.pools
    )


def limits_code(deployment: Deployment) -> str:
    """'256/8,192': requests and tokens of a step at most."""
    return " + ".join(
        f"{pool.replica.max_num_seqs}/{pool.replica.max_num_batched_tokens:,}" for pool in deployment.pools
    )


def precisions_text(deployment: Deployment) -> str:
    found = dict.fromkeys(precision_text(pool.replica) for pool in deployment.pools)
    return " + ".join(found)


def _money(value: float | None) -> str:
    return NONE if value is None else dollars(value).removeprefix("$")


def _range(figure: Prediction) -> str:
    return time_interval_text((figure.low, figure.high)) if figure.high < NEVER_S else NONE


def _pruned(pruned: Sequence[Pruned]) -> Iterator[RenderableType]:
    """By the kind of the reason, the most frequent first, each with an example."""
    groups = pruned_by_reason(pruned)
    total = sum(one.count for one in pruned)
    yield Text(f"Left out: {count_text(total, 'deployment')}", style="bold")
    for reason, members in groups[:MAX_REASONS]:
        first = members[0]
        count = sum(one.count for one in members)
        detail = detail_text(first.reason, reason)
        example = f"{plain(first.what)}{': ' + plain(detail) if detail else ''}"
        others = "for example " if len(members) > 1 else ""
        yield Padding(Text(f"{count:,} × {plain(reason)} ({others}{example})"), (0, 0, 0, 2))
    if len(groups) > MAX_REASONS:
        yield Padding(
            Text(f"… and {len(groups) - MAX_REASONS} more reasons (--html and --json show all)"), (0, 0, 0, 2)
        )


def pruned_by_reason(pruned: Sequence[Pruned]) -> list[tuple[str, list[Pruned]]]:
    """Reasons without their figures ('needs … GB'), the most frequent first, each with all that it left out."""
    groups: dict[str, list[Pruned]] = defaultdict(list)
    for one in pruned:
        groups[_AMOUNT.sub("…", one.reason.partition(":")[0])].append(one)
    return sorted(groups.items(), key=lambda group: -sum(one.count for one in group[1]))


def detail_text(reason: str, group: str) -> str:
    """What a reason says beyond its group's."""
    return reason.removeprefix(group).lstrip(": ")
