"""report.html of a run: one file that shows it in a browser, from a disk, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from powerband.bench.load import LoadResult
from powerband.bench.report.page_data import page_data
from powerband.bench.report.results import RunReport
from powerband.html_page import page_html, write_page


def write_report(report: RunReport, loads: Sequence[LoadResult], path: Path) -> None:
    """loads: of the report's points, in their order. Raises EnvironmentFault when it cannot be written."""
    write_page(report_html(report, loads), path)


def report_html(report: RunReport, loads: Sequence[LoadResult]) -> str:
    title = f"{report.target.model}: powerband bench, {report.started_at}"
    return page_html("bench/report", title=title, data=page_data(report, loads))
