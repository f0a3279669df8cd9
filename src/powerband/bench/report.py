"""report.html: one file that shows a run in a browser, from a disk, without a network.

All it needs is in it: style, scripts and data. Its content security policy allows these very scripts by their hashes
and nothing else, so that no text of a server can become a script, and nothing is ever fetched.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import msgspec

from powerband.bench.messages import Sample
from powerband.bench.page_data import page_data
from powerband.bench.results import RunReport
from powerband.errors import EnvironmentFault

# By the place in report.html, in the order in which they run.
SCRIPTS = {"echarts": "echarts.common.min.js", "charts": "charts.js", "report": "report.js"}
# As escapes of JSON: within a script element a '<' could end it.
_ESCAPES = {b"<": b"\\u003c", b">": b"\\u003e", b"&": b"\\u0026"}


def write_report(report: RunReport, samples_by_point: Sequence[Sequence[Sample]], path: Path) -> None:
    """samples_by_point: of the report's points, in their order. Raises EnvironmentFault when it cannot be written."""
    page = report_html(report, samples_by_point)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as problem:
        raise EnvironmentFault(f"Cannot write {path}: {problem.strerror}.", hint="Name another file.") from None


def report_html(report: RunReport, samples_by_point: Sequence[Sequence[Sample]]) -> str:
    data = msgspec.json.encode(page_data(report, samples_by_point))
    for char, escape in _ESCAPES.items():
        data = data.replace(char, escape)
    style, scripts = _part("report.css"), {place: _part(name) for place, name in SCRIPTS.items()}
    parts = {
        "policy": html.escape(_policy(style, list(scripts.values()))),
        "title": html.escape(f"{report.target.model}: powerband bench, {report.started_at}"),
        "style": style,
        "data": data.decode(),
        **scripts,
    }
    # In one pass, so that nothing put in is looked at for places.
    return re.sub(r"\[\[(\w+)\]\]", lambda found: parts[found[1]], _part("report.html"))


def _policy(style: str, scripts: Sequence[str]) -> str:
    hashes = " ".join(_hash(script) for script in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    """As a source expression of CSP."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _part(name: str) -> str:
    # newline: as they are in the page, so that hashes agree with what a browser reads
    return files("powerband.bench").joinpath("page", name).read_text(encoding="utf-8").replace("\r\n", "\n")
