"""The documentation says what the code does."""

from __future__ import annotations

import functools
import re
import runpy
import tomllib
from pathlib import Path

import pytest

from powerband.cli.main import build_app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
# A command in a code block or between backticks, up to the end of it or the next pipe or comment.
# After a "$ " stands an example of a mistake.
COMMAND = re.compile(r"(?:^|[`/|>] ?)powerband ((?:(?:config|keys) )?[a-z]+)([^`\n#|<]*)", re.MULTILINE)


def test_generated_pages_are_current() -> None:
    for path, content in runpy.run_path(str(ROOT / "scripts" / "document.py"))["pages"]().items():
        assert path.read_text() == content, "run: python scripts/document.py"


def test_every_page_is_in_the_navigation() -> None:
    configuration = tomllib.loads((ROOT / "zensical.toml").read_text())
    listed = {page for entry in configuration["project"]["nav"] for page in entry.values()}
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_sections_lead_to_one(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text())
    wrong = [
        f"{name}#{section}" for name, section in links if section not in sections_of(page.parent / (name or page.name))
    ]
    assert wrong == []


def sections_of(page: Path) -> set[str]:
    """The anchors of its headings, as Markdown's table of contents makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_flags_exist(page: Path) -> None:
    for name, rest in COMMAND.findall(page.read_text()):
        assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)) <= flags_of(name), f"powerband {name}{rest}"


@functools.cache
def flags_of(command: str) -> set[str]:
    """Those that help shows, and those that are only understood, such as other tools' names of options."""
    words = command.split()
    app = build_app(words[0])
    for word in words:
        app = app[word]
    if app.default_command is None:  # a group, such as 'keys'
        return {"--help"}
    return {"--help", *(name for argument in app.assemble_argument_collection() for name in argument.names)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets


def test_every_code_of_the_api_is_explained() -> None:
    rooms = ("server", "web", "gateway", "dispatch", "core")
    source = "".join(path.read_text() for room in rooms for path in (ROOT / "src/powerband" / room).rglob("*.py"))
    codes = set(re.findall(r"(?:HttpError|_refuse)\(\s*\d+,\s*\"([a-z_]+)\"", source)) - {"client_disconnected"}
    codes |= set(re.findall(r"LimitReached\(\s*\"([a-z_]+)\"", source))
    errors = source + (ROOT / "src/powerband/errors.py").read_text()
    codes |= set(re.findall(r"default_code = \"([a-z_]+)\"", errors)) - {"usage_error", "environment_error"}
    assert len(codes) > 15
    explained = set(re.findall(r"`([a-z_]+)`", (ROOT / "docs" / "errors.md").read_text()))
    assert codes <= explained, codes - explained
