"""A run on a terminal: the verdict first, then the figures, and what they rest on. 80 columns are enough."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from powerband.bench.report.results import Point, RunReport
from powerband.metrics.figures import PERCENTILES
from powerband.metrics.shown import (
    FIGURES,
    INVALID,
    NONE,
    OUTCOMES,
    digits,
    plain,
    share_interval_text,
    share_text,
    time_interval_text,
    time_text,
)
from powerband.spec.quantities import count_text

STYLES = {"PASS": "bold green", "MISSED": "bold red", "INVALID": "bold yellow", "MEASURED": "bold"}
_MAX_ERRORS = 5


def run_table(report: RunReport) -> RenderableType:
    """For a rich Console: one point in full, several with a row each and their notes."""
    parts: list[RenderableType] = []
    if report.headline:
        parts += [Text(report.headline, style="bold"), ""]
    if len(report.points) == 1:
        parts += [*_verdict(report.points[0]), "", Text(subject(report), style="dim")]
        parts += _full_point(report.points[0])
    else:
        if report.slo is not None and report.slo.limits:
            parts.append(Text(f"SLO: {report.slo} for {report.slo.attainment * 100:g} % of requests"))
        parts += [Text(subject(report), style="dim"), "", _rows(report.points)]
        parts += [_fact(point.label, point.client.fault) for point in report.points if point.client.fault]
    return Group(*parts)


def subject(report: RunReport) -> str:
    """What was measured, in one line."""
    server = plain(" ".join(part for part in (report.server.kind, report.server.version) if part))
    workload = plain(str(report.workload.get("name", "")))
    return f"{plain(report.target.model)} at {report.target.base} ({server}), {report.target.endpoint}, {workload}"


def verdict_text(point: Point) -> str:
    """The reason beside the verdict's word, in a sentence."""
    summary = point.summary
    if point.client.fault:
        of = "The figures are not about the server."
        if point.interrupted:
            of = "Latencies are those of the requests that had ended: they favour short ones."
        return f"{point.client.fault[0].upper()}{point.client.fault[1:]}. {of}"
    if summary.slo is None:
        return "No SLO was given (--slo ttft=500ms,tpot=50ms)."
    within = share_interval_text(summary.attainment_interval)
    text = f"{share_text(summary.attainment)} of requests kept {str(summary.slo) or 'the SLO'} ({within} at 95 %); "
    text += f"{summary.slo.attainment * 100:g} % must."
    if point.saturated:
        text += " The queue grew to the end: the server is saturated."
    if point.stopped:
        text += " Stopped early: the SLO was certainly missed."
    return text


def _verdict(point: Point) -> Iterator[RenderableType]:
    summary = point.summary
    line = Table.grid(padding=(0, 2))
    line.add_row(Text(point.verdict, style=STYLES[point.verdict]), verdict_text(point))
    goodput = f"goodput {digits(summary.goodput)} requests/s; " if summary.goodput is not None else ""
    rate = f"{digits(summary.request_rate)} requests/s arrived, {point.offered} were asked for"
    if point.offered.kind == "concurrency":
        rate = f"{digits(summary.request_rate)} requests/s from {point.offered}"
    line.add_row("", f"{goodput}{rate}")
    yield line


def _full_point(point: Point) -> Iterator[RenderableType]:
    yield ""
    yield _latencies(point)
    yield ""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, text in [
        ("Throughput", throughput_text(point)),
        ("Requests", outcomes_text(point)),
        ("Valid", valid_text(point)),
        ("Misses", misses_text(point)),
        ("Client", client_text(point)),
        ("Server", server_text(point)),
    ]:
        if text:
            facts.add_row(name, text)
    yield facts
    if point.errors:
        yield Text("Failures of the whole run:", style="bold")
    for group in point.errors[:_MAX_ERRORS]:
        status = f"HTTP {group.status}, " if group.status else ""
        text = f"{group.count:,} × {OUTCOMES[group.outcome]}: {status}{plain(group.message)}"
        yield Padding(Text(text, style="red"), (0, 0, 0, 2))
    if len(point.errors) > _MAX_ERRORS:
        yield Padding(Text(f"… and {len(point.errors) - _MAX_ERRORS} more kinds in run.json"), (0, 0, 0, 2))


def _latencies(point: Point) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("")
    for heading in ("mean", *(f"p{q:g}" for q in PERCENTILES), "p99, 95 % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for shown, *cells, interval in latency_rows(point):
        table.add_row(shown, *cells, Text(interval, style="dim"))
    return table


def latency_rows(point: Point) -> list[tuple[str, ...]]:
    """Of each figure: name, mean, PERCENTILES, and the 95 % interval of the last of them."""
    return [
        (
            shown,
            time_text(figure.mean),
            *(time_text(figure.percentiles[q]) for q in PERCENTILES),
            time_interval_text(figure.intervals[PERCENTILES[-1]]),
        )
        for name, shown in FIGURES.items()
        if name != "send_lag" and (figure := point.summary.figures.get(name)) is not None
    ]


def _rows(points: tuple[Point, ...]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("load")
    table.add_column("verdict")
    for heading in ("kept SLO", "goodput", "TTFT p50", "p99", "TPOT p50", "p99", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in points:
        label, verdict, *cells = load_row(point)
        table.add_row(label, Text(verdict, style=STYLES[point.verdict]), *cells)
    return table


def load_row(point: Point) -> tuple[str, ...]:
    """Label, verdict, SLO kept, goodput, TTFT p50 and p99, TPOT p50 and p99, output tokens/s."""
    summary = point.summary
    latencies = [
        time_text(summary.figures[name].percentiles[q]) if name in summary.figures else NONE
        for name in ("ttft", "tpot")
        for q in (50.0, 99.0)
    ]
    kept, goodput = share_text(summary.attainment), digits(summary.goodput)
    return plain(point.label), point.verdict, kept, goodput, *latencies, digits(summary.output_tokens_per_s)


def throughput_text(point: Point) -> str:
    summary, whole = point.summary, point.whole
    return (
        f"{digits(summary.output_tokens_per_s)} output and {digits(summary.prompt_tokens_per_s)} prompt tokens/s in "
        f"the {summary.window.seconds:.0f} s that count; whole run of {whole.seconds:.0f} s: "
        f"{digits(whole.output_tokens_per_s)} output tokens/s, {digits(whole.requests_per_s)} requests/s"
    )


def outcomes_text(point: Point) -> str:
    counts = point.summary.outcomes
    parts = [f"{counts[name]:,} {shown}" for name, shown in OUTCOMES.items() if name in counts]
    text = f"{count_text(point.summary.scheduled, 'counted request')}: {', '.join(parts) or 'none'}"
    if point.unsent:
        text += f"; {point.unsent:,} more were planned and not due before the end"
    if point.cut is not None:
        context = f"the context of {point.cut.max_model_len:,} tokens"
        text += f"; {point.cut.requests:,} of the whole run were cut to fit {context}"
    if point.short_answers:
        text += f"; {count_text(point.short_answers, 'answer')} shorter than asked for"
    return text


def valid_text(point: Point) -> str:
    share = point.summary.valid_share
    return "" if share is None else f"{share_text(share)} of the answers have the form that was asked for"


def misses_text(point: Point) -> str:
    names = {name: f"by {shown}" for name, shown in FIGURES.items()} | OUTCOMES | INVALID
    misses = sorted(point.summary.misses.items(), key=lambda item: -item[1])
    return ", ".join(f"{count:,} {names[name]}" for name, count in misses)


def client_text(point: Point) -> str:
    """How far the client can be trusted."""
    client, lag = point.client, point.summary.figures.get("send_lag")
    text = (
        f"sent {time_text(lag.percentiles[50.0])} late at the median, {time_text(lag.maximum)} at most; " if lag else ""
    )
    text += f"{share_text(client.core_share)} of a core, {digits(client.chunks_per_s)} chunks/s"
    if client.ceiling_share is not None:
        text += f", {share_text(client.ceiling_share)} of what it can bear"
    if point.uncounted:
        text += f"; the server did not count the tokens of {count_text(point.uncounted, 'answer')}: chunks were counted"
    return text


def server_text(point: Point) -> str:
    """The server's own metrics; '' where it reported none."""
    server = point.server
    peaks = {name: _max_value(server.values.get(name)) for name in ("running", "waiting")}
    parts = [f"{name} {value:,.0f} at most" for name, value in peaks.items() if value is not None]
    usage = _max_value(server.values.get("kv_usage"))
    if usage is not None:
        parts.append(f"KV cache {share_text(usage)} full at most")
    queries, hits = server.growth("prefix_queries"), server.growth("prefix_hits")
    if queries and hits is not None:
        parts.append(f"{share_text(hits / queries)} of prompt tokens from the prefix cache")
    preemptions = server.growth("preemptions")
    if preemptions:
        parts.append(f"{preemptions:,.0f} preemptions")
    mean, ours = server.mean("ttft"), point.summary.figures.get("service_ttft")
    if mean is not None and ours is not None:
        parts.append(f"mean TTFT {time_text(mean)} (client, from sending: {time_text(ours.mean)})")
    if server.problem:
        parts.append(plain(server.problem))
    return "; ".join(parts)


def _max_value(values: list[float | None] | None) -> float | None:
    return max((value for value in values or () if value is not None), default=None)


def _fact(name: str, text: str) -> Text:
    return Text(f"{plain(name)}: {text}", style="yellow")
