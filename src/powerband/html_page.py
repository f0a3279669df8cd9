"""Pages that are one file: shown in a browser, from a disk, without a network.

All that a page needs is in it: style, scripts and data. Its content security policy allows these very scripts by their
hashes and nothing else, so that no text from elsewhere can become a script, and nothing is ever fetched.

    pages/          what all pages share: style.css, drawing.js, and ECharts as others wrote it
    PACKAGE/page/   a package's own: report.html with the places, report.css, and the scripts that report.html names
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

from powerband.errors import EnvironmentFault

_SHARED = {"echarts": "echarts.common.min.js", "drawing": "drawing.js"}
# As escapes of JSON: within a script element a '<' could end it.
_ESCAPES = {b"<": b"\\u003c", b">": b"\\u003e", b"&": b"\\u0026"}


def page_html(package: str, *, title: str, data: object) -> str:
    """The page of a package ('bench/report') with its data: what JSON can hold, in the element #data."""
    encoded = msgspec.json.encode(data)
    for char, escape in _ESCAPES.items():
        encoded = encoded.replace(char, escape)
    own = f"{package}/page"
    style = _part("pages", "style.css") + _part(own, "report.css")
    page = _part(own, "report.html")
    scripts = {
        name: _part("pages", _SHARED[name]) if name in _SHARED else _part(own, f"{name}.js")
        for name in re.findall(r"<script>\[\[(\w+)\]\]</script>", page)
    }
    parts = {
        "policy": html.escape(_policy(style, list(scripts.values()))),
        "title": html.escape(title),
        "style": style,
        "data": encoded.decode(),
        **scripts,
    }
    # In one pass, so that nothing put in is looked at for places.
    return re.sub(r"\[\[(\w+)\]\]", lambda found: parts[found[1]], page)


def write_page(page: str, path: Path) -> None:
    """Raises EnvironmentFault when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as problem:
        raise EnvironmentFault(f"Cannot write {path}: {problem.strerror}.", hint="Name another file.") from None


def _policy(style: str, scripts: Sequence[str]) -> str:
    hashes = " ".join(_hash(script) for script in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    """As a source expression of CSP."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _part(folder: str, name: str) -> str:
    # newline: as they are in the page, so that hashes agree with what a browser reads
    path = files("powerband").joinpath(*folder.split("/"), name)
    return path.read_text(encoding="utf-8").replace("\r\n", "\n")
