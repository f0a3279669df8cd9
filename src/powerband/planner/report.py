"""The page of a plan: one file that shows the frontier in a browser, from a disk, without a network."""

from __future__ import annotations

from pathlib import Path

from powerband.html_page import page_html, write_page
from powerband.planner.outcome import Findings
from powerband.planner.page_data import page_data


def write_report(findings: Findings, path: Path) -> None:
    """Raises EnvironmentFault when it cannot be written."""
    write_page(report_html(findings), path)


def report_html(findings: Findings) -> str:
    return page_html("planner", title=f"{findings.model}: powerband plan", data=page_data(findings))
