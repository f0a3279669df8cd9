"""The page of a plan: one file that shows the frontier in a browser, from a disk, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from powerband.html_page import page_html, write_page
from powerband.planner.report.page_data import page_data
from powerband.planner.results import PlanResults


def write_report(results: PlanResults, path: Path, command: Sequence[str] = ()) -> None:
    """command: that made the plan; the page's commands repeat it. Raises EnvironmentFault when it cannot be written."""
    write_page(report_html(results, command), path)


def report_html(results: PlanResults, command: Sequence[str] = ()) -> str:
    return page_html("planner/report", title=f"{results.model}: powerband plan", data=page_data(results, command))
