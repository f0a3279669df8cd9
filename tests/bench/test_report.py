"""report.html: whole, offline, and no text of a server's becomes markup."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
import shutil
import subprocess
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import pytest
from samples_for_tests import load, played, point, report, workload

from powerband.bench.report.html_report import report_html, write_report
from powerband.bench.report.page_data import MAX_SCATTER_POINTS, page_data, thinned
from powerband.bench.report.results import RunReport
from powerband.errors import EnvironmentFault
from powerband.metrics.definitions import DEFINITIONS
from powerband.metrics.record import Outcome
from powerband.spec.workload.lengths import Fixed
from powerband.spec.workload.workload import RequestMix

PAGE = files("powerband.bench.report").joinpath("page")
SHARED = files("powerband").joinpath("pages")
NODE = shutil.which("node")
HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>[[data]]'\"&"
OURS = [PAGE.joinpath(name) for name in ("report.html", "report.css", "charts.js", "report.js")]
OURS += [SHARED.joinpath(name) for name in ("style.css", "drawing.js")]


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.content: list[tuple[str, dict[str, str | None], str]] = []
        self.is_inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.is_inside = tag in ("script", "style", "title")

    def handle_endtag(self, tag: str) -> None:
        self.is_inside = False

    def handle_data(self, data: str) -> None:
        if self.is_inside:
            self.content.append((*self.elements[-1], data))

    def texts(self, tag: str, **attributes: str) -> list[str]:
        whole: dict[int, str] = {}
        for name, found, data in self.content:
            if name == tag and all(found.get(key) == value for key, value in attributes.items()):
                whole[id(found)] = whole.get(id(found), "") + data
        return list(whole.values())


@pytest.fixture(scope="module")
def page() -> Page:
    result = load(requests=300, failures=0.05)
    return Page(report_html(report(point(result)), [result]))


def data_of(page: Page) -> dict[str, Any]:
    (text,) = page.texts("script", type="application/json")
    return json.loads(text)


def test_nothing_is_fetched(page: Page):
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "action", "poster", "data"} & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")]
    for path in OURS:
        text = path.read_text()
        assert not re.search(r"https?:|//[a-z]+\.|url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\(", text), path


def test_the_policy_allows_what_is_inlined_and_nothing_else(page: Page):
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in (policy or "").split(";"))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"

    def hashed(texts: list[str]) -> str:
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    (data,) = page.texts("script", type="application/json")
    assert rules.pop("script-src") == hashed([text for text in page.texts("script") if text != data])
    assert rules.pop("style-src") == hashed(page.texts("style"))
    assert not rules
    assert not [tag for tag, attributes in page.elements if "style" in attributes], "styles in attributes are refused"


def test_our_scripts_put_text_in_as_text():
    for path in OURS:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", path.read_text()
        )
    assert 'renderMode: "richText"' in SHARED.joinpath("drawing.js").read_text(), "tooltips on the canvas, not in HTML"


def test_hostile_text_stays_text(page: Page):
    result = load(requests=60)
    bad = tuple(msgspec.structs.replace(s, outcome=Outcome.ERROR, error=HOSTILE) for s in result.samples[:9])
    result = replace(result, samples=(*bad, *result.samples[9:]))
    run = report(replace(point(result), label=HOSTILE))
    run = replace(
        run,
        target=replace(run.target, model=HOSTILE),
        server=replace(run.server, version=HOSTILE),
        workload={"name": HOSTILE},
        command=("bench", HOSTILE),
    )
    attacked = Page(report_html(run, [result]))
    assert [tag for tag, _ in attacked.elements] == [tag for tag, _ in page.elements]
    data = data_of(attacked)
    assert data["points"][0]["failures"][0]["message"] == HOSTILE
    assert data["workload"]["name"] == HOSTILE
    assert attacked.texts("title")[0].startswith(HOSTILE)


def test_the_numbers_are_the_tables(page: Page):
    result = load(requests=300, failures=0.05)
    one = point(result)
    (shown,) = data_of(page)["points"]
    assert shown["verdict"] == one.verdict
    assert shown["attainment"] == one.summary.attainment
    assert sum(count for _, count in shown["misses"]) == one.summary.scheduled - one.summary.good
    median = shown["quantiles"]["ttft"][100]
    assert median == pytest.approx(one.summary.figures["ttft"].percentiles[50.0], rel=1e-3)
    timeline = shown["timeline"]
    assert sum(timeline["arrivals"]) * timeline["width_s"] == pytest.approx(300)
    tokens = sum(sample.output_tokens for sample in result.samples)
    assert sum(timeline["tokens"]) * timeline["width_s"] == pytest.approx(tokens, rel=1e-3)
    moment = timeline["width_s"] * 40
    spans = [(sample.sent_s, sample.chunk_times_s[-1]) for sample in result.samples if sample.chunk_times_s]
    assert timeline["in_flight"][40] == sum(start <= moment < end for start, end in spans) > 0


def test_failures_are_shown_by_kind_with_what_the_client_saw():
    result = load(requests=300, failures=0.05)
    one = point(result)
    data = page_data(report(one), [result])["points"][0]
    failed = [sample for sample in result.samples if sample.outcome is not Outcome.OK]
    (name, count, note) = data["tiles"][-1]
    assert (name, count) == ("Failed", str(len(failed)))
    assert note.endswith("of 300 requests")
    assert [(kind["count"], kind["status"], kind["message"]) for kind in data["failures"]] == [
        (group.count, group.status, group.message) for group in one.errors
    ]
    assert sum(kind["count"] for kind in data["failures"]) == len(failed)
    refused = next(kind for kind in data["failures"] if kind["status"] == 429)
    arrivals = [sample.scheduled_s for sample in failed if sample.status == 429]
    assert refused["scheduled_s"] == pytest.approx([min(arrivals), max(arrivals)], abs=1e-3)
    assert refused["begun"] == 0


def test_an_answer_that_broke_off_is_a_failure_whose_tokens_had_begun_to_come():
    result = load(requests=60)
    broken = msgspec.structs.replace(result.samples[7], outcome=Outcome.ERROR, error="the stream ended early")
    result = replace(result, samples=(*result.samples[:7], broken, *result.samples[8:]))
    (failure,) = page_data(report(point(result)), [result])["points"][0]["failures"]
    assert (failure["message"], failure["begun"]) == ("the stream ended early", 1)


def test_lengths_are_counted_as_asked_and_as_got():
    result = load(requests=300, failures=0.05)
    prompts, outputs = page_data(report(point(result)), [result])["points"][0]["lengths"]
    answered = [sample for sample in result.samples if sample.outcome is Outcome.OK]
    for found in (prompts, outputs):
        assert (sum(found["asked"]), sum(found["got"])) == (300, len(answered))
        assert len(found["edges"]) == len(found["asked"]) + 1 <= 31
    assert outputs["rows"][0][-1] == f"{sum(sample.asked_tokens for sample in result.samples):,}"
    assert outputs["rows"][1][-1] == f"{sum(sample.output_tokens for sample in answered):,}"
    planned = [request for chain in result.schedule.chains for request in chain.requests]
    assert prompts["rows"][0][-1] == f"{sum(request.new_tokens for request in planned):,}"


def test_a_fixed_length_is_one_bin():
    result = played(workload(mix=RequestMix(Fixed(100), Fixed(20))).draw(0, num_requests=50))
    prompts, outputs = page_data(report(point(result)), [result])["points"][0]["lengths"]
    assert (prompts["edges"], prompts["asked"], prompts["got"]) == ([100.0, 101.0], [50], [50])
    assert (outputs["edges"], outputs["got"]) == ([20.0, 21.0], [50])


@pytest.mark.skipif(NODE is None, reason="needs node")
@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.031, 0.9], [0.02, 0.05, 0.1, 0.2, 0.5, 1]),
        ([0.1, 0.1], [0.1, 0.2]),
        ([3.0, 4.0], [2, 5]),
        ([0.0004, 20.0], [0.001, 0.01, 0.1, 1, 10]),
    ],
)
def test_logarithmic_axes_have_round_ticks(values: list[float], ticks: list[float], tmp_path: Path):
    script = tmp_path / "ticks.js"
    script.write_text(
        "const window = { addEventListener() {}, matchMedia: () => ({ addEventListener() {} }) };\n"
        + SHARED.joinpath("drawing.js").read_text()
        + f"console.log(JSON.stringify(Drawing.logAxis({{}}, {values}, String).axisLabel.customValues));"
    )
    made = subprocess.run([str(NODE), script], capture_output=True, text=True, check=True, timeout=30)
    assert json.loads(made.stdout) == ticks


def test_it_explains_itself(page: Page):
    assert [row[0] for row in data_of(page)["definitions"]["rows"]] == [one.name for one in DEFINITIONS]


def test_the_slowest_requests_are_there_chunk_by_chunk(page: Page):
    slowest = data_of(page)["points"][0]["slowest"]
    assert len(slowest) == 20
    ends = [request["chunks_s"][-1] for request in slowest]
    assert ends == sorted(ends, reverse=True)


def test_a_run_of_which_nothing_was_answered_has_a_page():
    result = load(requests=30, failures=1.0)
    (shown,) = data_of(Page(report_html(report(point(result)), [result])))["points"]
    assert (shown["quantiles"], shown["slowest"], len(shown["scatter"]["failed"])) == ({}, [], 30)


def test_several_loads_are_in_one_page():
    rates = (4.0, 8.0, 16.0)
    loads = [load(rate, 60) for rate in rates]
    run = report(*(point(one, rate) for one, rate in zip(loads, rates, strict=True)))
    data = data_of(Page(report_html(run, loads)))
    assert [shown["offered"]["value"] for shown in data["points"]] == list(rates)


def test_a_large_run_is_thinned_but_keeps_its_extremes():
    points = [(float(i), float(i * 7919 % 100_003)) for i in range(100_000)]
    kept = thinned(points, 2_000)
    assert len(kept) <= 2_000
    assert kept == sorted(kept)
    values = [value for _, value in points]
    assert {min(values), max(values)} <= {value for _, value in kept}
    assert thinned(points[:50], 2_000) == points[:50]


def test_a_page_stays_small():
    few, many = (load(rate=40.0, requests=n) for n in (1_000, 6_000))

    def size(result: Any) -> int:
        run: RunReport = report(point(result))
        return len(msgspec.json.encode(page_data(run, [result])))

    # What grows is dots, of which there are at most so many.
    assert size(many) - size(few) < 5_000 * 25
    assert MAX_SCATTER_POINTS * 25 < 1_000_000


def test_what_others_wrote_is_as_they_wrote_it():
    vendored = json.loads(SHARED.joinpath("vendored.json").read_text())["files"]
    for name, about in vendored.items():
        assert hashlib.sha256(SHARED.joinpath(name).read_bytes()).hexdigest() == about["sha256"], name
    ours = {path.name for path in OURS}
    assert {path.name for path in SHARED.iterdir()} - {*ours, "vendored.json"} == set(vendored)
    assert {path.name for path in PAGE.iterdir()} <= ours
    assert "</script" not in SHARED.joinpath("echarts.common.min.js").read_text().lower()


def test_the_page_is_part_of_the_package():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"bench/report/page/*"' in project
    assert '"pages/*"' in project


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path):
    result = load(requests=20)
    with pytest.raises(EnvironmentFault, match="Cannot write"):
        write_report(report(point(result)), [result], tmp_path)
