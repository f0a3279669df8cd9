"""The page of a plan: whole, offline, every name is text; a browser draws it, where there is one."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from results_for_tests import SLO_, evaluation, results

from powerband.errors import EnvironmentFault
from powerband.planner.picked import deployment_id
from powerband.planner.report.html_report import report_html, write_report
from powerband.planner.report.json_export import results_as_dict
from powerband.planner.results import PlanResults, Pruned
from powerband.spec.slo import SLO

PAGE = files("powerband.planner.report").joinpath("page")
HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>[[data]]'\"&"
OURS = ("report.html", "report.css", "charts.js", "report.js")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NODE = shutil.which("node")


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text within them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.is_inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        self.is_inside = True

    def handle_endtag(self, tag: str) -> None:
        self.is_inside = False

    def handle_data(self, data: str) -> None:
        if self.is_inside:
            self.texts[-1] += data

    def content(self, tag: str) -> list[str]:
        return [text for (name, _), text in zip(self.elements, self.texts, strict=True) if name == tag]


def data_of(text: str) -> dict[str, Any]:
    page = Page(text)
    (data,) = (told for (_, found), told in zip(page.elements, page.texts, strict=True) if found.get("id") == "data")
    return json.loads(data)


@pytest.fixture(scope="module")
def found() -> PlanResults:
    return results()


@pytest.fixture(scope="module")
def page(found: PlanResults) -> str:
    return report_html(found)


def test_nothing_is_fetched(page: str):
    for tag, attributes in Page(page).elements:
        assert not {"src", "href", "srcset", "action", "poster", "data", "style"} & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")]
    for name in OURS:
        text = PAGE.joinpath(name).read_text()
        assert not re.search(r"https?:|//[a-z]+\.[a-z]+/|url\(|@import|fetch\(|XMLHttpRequest|WebSocket", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", text), name


def test_the_page_is_part_of_the_package():
    assert '"planner/report/page/*"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_the_policy_allows_what_is_inlined_and_nothing_else(page: str):
    parsed = Page(page)
    (policy,) = [a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"]
    _, *scripts = parsed.content("script")  # the first is the data
    for text in (*scripts, *parsed.content("style")):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in (policy or "")
    assert (policy or "").startswith("default-src 'none'; script-src 'sha256-")


def test_hostile_names_stay_text(found: PlanResults, page: str):
    attacked = replace(
        found, model=HOSTILE, workload={"name": HOSTILE}, reasons=(HOSTILE,), pruned=(Pruned(HOSTILE, HOSTILE),)
    )
    text = report_html(attacked)
    assert [tag for tag, _ in Page(text).elements] == [tag for tag, _ in Page(page).elements]
    data = data_of(text)
    assert (data["reasons"], data["workload"]["name"]) == ([HOSTILE], HOSTILE)
    assert Page(text).content("title")[0].startswith(HOSTILE)


def test_the_numbers_are_those_of_the_json(found: PlanResults, page: str):
    shown, told = data_of(page), results_as_dict(found)
    assert shown["recommended"] == told["recommended"]
    assert shown["roles"] == told["alternatives"]
    for ours, theirs in zip(shown["evaluations"], told["evaluations"], strict=True):
        assert (ours["name"], ours["meets_slo"], ours["dominated"]) == (
            theirs["name"],
            theirs["meets_slo"],
            theirs["dominated"],
        )
        value = theirs["figures"]["ttft_s"]["value"]
        assert (ours["figures"]["ttft_s"] or [None])[0] == (None if value is None else pytest.approx(value, rel=1e-3))
    assert sum(count for _, count, _ in shown["pruned"]) == sum(one["count"] for one in told["pruned"])


def test_the_choice_and_its_promise_are_at_the_top(page: str):
    data = data_of(page)
    assert data["headline"] == "vLLM on 1 × A100-80G int4 for $3.43 an hour keeps the SLO."
    assert ["TTFT p95", "623 ms", "499–779 ms; limit 1.00 s"] in data["tiles"]
    assert data["axes"] == ["usd_per_hour", "ttft_s"]


def test_the_chart_begins_with_what_was_limited_and_is_priced():
    tpot = results(slo=SLO.parse("tpot=60ms"))
    assert data_of(report_html(tpot))["axes"] == ["usd_per_hour", "tpot_s"]
    one = replace(evaluation(), usd_per_hour=None)
    free = replace(tpot, evaluations=(one,), recommended=None, alternatives={}, objective="throughput")
    assert data_of(report_html(free))["axes"] == ["devices", "capacity"]


def test_a_thousand_deployments_are_a_page_of_modest_size(found: PlanResults):
    many = replace(found, evaluations=found.evaluations * 6)
    assert len(many.evaluations) > 1200
    growth = len(report_html(many)) - len(report_html(found))
    assert growth < 5 * len(found.evaluations) * 1000


def test_a_file_that_cannot_be_written_is_told(found: PlanResults, tmp_path: Path):
    with pytest.raises(EnvironmentFault, match="Cannot write"):
        write_report(found, tmp_path)


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_line_of_the_best_leaves_out_what_another_beats(tmp_path: Path):
    script = tmp_path / "best.js"
    points = [
        {"x": 1, "y": 9},
        {"x": 2, "y": 4},
        {"x": 2, "y": 5},
        {"x": 3, "y": 4},
        {"x": 4, "y": 1},
        {"x": 5, "y": 2},
    ]
    script.write_text(
        "const Drawing = {};\n"
        + PAGE.joinpath("charts.js").read_text()
        + f"const points = {json.dumps(points)}, less = {{better: -1}}, more = {{better: 1}};\n"
        + "console.log(JSON.stringify([Charts.best(points, less, less), Charts.best(points, less, more)]));"
    )
    made = subprocess.run([str(NODE), script], capture_output=True, text=True, check=True, timeout=30)
    low, high = ([(point["x"], point["y"]) for point in line] for line in json.loads(made.stdout))
    assert low == [(1, 9), (2, 4), (4, 1)]
    assert high == [(1, 9)]


def drawn(found: PlanResults, folder: Path, fragment: str = "") -> str:
    """The page as a browser has it after its scripts ran."""
    path = folder / "plan.html"
    write_report(found, path)
    command = [
        str(CHROMIUM),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'browser'}",
    ]
    command += ["--virtual-time-budget=2000", "--dump-dom", f"file://{path}{fragment}"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "<html" not in made.stdout:
        pytest.skip(f"the browser does not run here: {made.stderr[-200:]}")
    return re.sub(r"<script.*?</script>", "", made.stdout, flags=re.DOTALL)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_the_plan_and_what_the_address_selects(found: PlanResults, tmp_path: Path):
    number = next(i for i, one in enumerate(found.evaluations) if one is found.alternatives["faster"])
    shown = Page(drawn(found, tmp_path, f"#{number}"))
    assert "for $3.43 an hour keeps the SLO." in shown.content("h1")[0]
    assert shown.content("h3") == ["vLLM on 1 × (2 A100-80G, TP 2, int4)"]
    assert "× 2.00" not in shown.texts
    assert "+100 %" in shown.texts, "what it costs more than the recommended one"
    assert shown.content("canvas"), "the chart"
    picked = f"--pick {deployment_id(found.evaluations[number].deployment)} -o plan.yaml"
    assert any(code.endswith(picked) for code in shown.content("code"))
    assert any(text.startswith("version: 1\n") for text in shown.content("pre")), "its plan file"
    rows = [attributes for tag, attributes in shown.elements if tag == "tr" and "data-i" in attributes]
    assert len(rows) == sum(one.meets_slo for one in found.frontier) + 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_a_plan_without_an_answer(tmp_path: Path):
    without = results(slo=replace(SLO_, ttft_s=1e-3), budget=0.1, model=HOSTILE)
    shown = Page(drawn(replace(without, alternatives={}), tmp_path))
    assert shown.content("h1") == ["Nothing on offer keeps the SLO within the budget."]
    assert "img" not in [tag for tag, _ in shown.elements]


def test_the_documentation_s_picture_is_drawn_from_the_json(found: PlanResults, tmp_path: Path):
    script = Path(__file__).parents[2] / "scripts" / "frontier_picture.py"
    told = json.dumps(results_as_dict(found))
    subprocess.run([sys.executable, script, tmp_path / "frontier.svg"], input=told, text=True, check=True, timeout=60)
    drawing = (tmp_path / "frontier.svg").read_text()
    words = Page(drawing).content("text")
    assert {"recommended", "cheaper", "faster", "SLO 1 s", "budget $5", "A100-80G"} <= set(words)
    assert len(drawing) < 200_000
