"""A comparison of two runs on a terminal, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from powerband.bench.report.compare import Comparison, Difference, FigureComparison, PointComparison
from powerband.metrics.shown import FIGURES, NONE, digits, plain, share_text, time_interval_text, time_text
from powerband.spec.quantities import count_text

STYLES = {"faster": "green", "slower": "red", "no difference shown": "dim", "too few requests": "dim"}
RATES = {
    "goodput": "goodput (1/s)",
    "attainment": "SLO kept",
    "request_rate": "arrivals (1/s)",
    "output_tokens_per_s": "output tokens/s",
}
NOTE = (
    "Intervals of B − A at 95 %, from the requests of these two runs; what changes from run to run is not in them: "
    "repeat both before a small difference is believed."
)


def comparison_table(comparison: Comparison) -> RenderableType:
    """For a rich Console: the warnings first, then each load."""
    parts: list[RenderableType] = [
        Text(f"A  {plain(comparison.run_a)}"),
        Text(f"B  {plain(comparison.run_b)}"),
    ]
    parts += [Text(f"Not a fair comparison: {plain(warning)}", style="bold yellow") for warning in comparison.warnings]
    for point in comparison.points:
        parts += ["", Text(_heading(point), style="bold"), _figures(point), "", _rates(point)]
    return Group(*parts, "", Text(NOTE, style="dim"))


def _heading(point: PointComparison) -> str:
    counts = next(((figure.count_a, figure.count_b) for figure in point.figures.values()), (0, 0))
    pairs = f"{count_text(counts[0], 'pair')} of requests"
    requests = f"{counts[0]:,} and {count_text(counts[1], 'request')}, not paired"
    return f"{plain(point.label)}: {pairs if point.paired else requests}"


def _figures(point: PointComparison) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("A", "B", "B/A", "B − A"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("B is", no_wrap=True)
    for name, shown in FIGURES.items():
        for row in _rows(shown, point.figures.get(name)):
            table.add_row(*row)
    return table


def _rows(shown: str, figure: FigureComparison | None) -> Iterator[tuple[str | Text, ...]]:
    if figure is None:
        return
    for statistic, difference in (("p50", figure.median), ("p99", figure.p99)):
        if difference.a_s is None and difference.b_s is None:
            continue
        yield (
            f"{shown} {statistic}",
            time_text(difference.a_s),
            time_text(difference.b_s),
            _ratio(difference.ratio),
            time_interval_text(difference.interval_s),
            _verdict(difference, figure.effect),
        )


def _verdict(difference: Difference, effect: str) -> Text:
    is_shown = difference.verdict in ("faster", "slower")
    text = f"{difference.verdict} ({effect})" if is_shown and effect else difference.verdict
    return Text(text if difference.verdict != "too few requests" else NONE, style=STYLES[difference.verdict])


def _rates(point: PointComparison) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    for _ in range(4):
        table.add_column(justify="right")
    table.columns[0].justify = "left"
    for name, (a, b) in point.rates.items():
        if a is not None or b is not None:
            text_of = share_text if name == "attainment" else digits
            table.add_row(RATES[name], text_of(a), text_of(b), _ratio(b / a if a and b is not None else None))
    return table


def _ratio(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}×"
