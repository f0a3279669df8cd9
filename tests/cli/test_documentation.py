"""The documentation says what the code does."""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_settings_is_current() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "document_settings.py"))
    assert script["PAGE"].read_text() == script["page"](), "run: python scripts/document_settings.py"


def test_every_page_is_in_the_navigation() -> None:
    configuration = tomllib.loads((ROOT / "zensical.toml").read_text())
    listed = {page for entry in configuration["project"]["nav"] for page in entry.values()}
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")}
