"""The page of `bench --compare`: runs side by side, in one file, and no text of a run becomes markup."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from samples_for_tests import load, point, report
from test_report import HOSTILE, Page, data_of

from powerband.bench.comparison.html_page import _flattened, comparison_html, run_names
from powerband.bench.report.compare import StoredRun, compare_samples, figure_values, judged_requests
from powerband.bench.report.result_files import write_run
from powerband.errors import UsageError
from powerband.html_page import write_page
from powerband.spec.slo import SLO

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def stored(
    folder: Path, *, rate: float = 6.0, slo: SLO | None = None, server: str = "powerband", **how: Any
) -> StoredRun:
    result = load(rate, requests=300, **how)
    run = report(point(result, rate), rate=rate)
    run = replace(run, server=replace(run.server, kind=server), slo=slo or run.slo)
    write_run(run, [result], folder)
    return StoredRun.read(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[StoredRun]:
    folder = tmp_path_factory.mktemp("runs")
    how = (("first", 1.0), ("quick", 0.8), ("slow", 1.4))
    return [stored(folder / name, slowness=slowness, server=name) for name, slowness in how]


@pytest.fixture(scope="module")
def page(runs: list[StoredRun]) -> str:
    return comparison_html(runs)


def test_each_run_stands_beside_the_first_with_ratio_spread_and_verdict(runs: list[StoredRun], page: str):
    data = data_of(Page(page))
    (shown,) = data["loads"]
    (tpot,) = (figure for figure in shown["figures"] if figure["name"] == "TPOT")
    statistic, _, others = tpot["rows"][0]
    assert statistic == "p50"
    sides = [[*figure_values(judged_requests(run, 0), "tpot").values()] for run in runs]
    for (_, ratio, spread, verdict), side in zip(others, sides[1:], strict=True):
        expected = compare_samples(sides[0], side, paired=True).median
        assert ratio == f"{expected.ratio:.2f}×"
        low, high = map(float, spread.split("–"))
        assert low < (expected.ratio or 0) < high
        assert verdict.startswith(expected.verdict)
    assert [verdict.split(" ")[0] for *_, verdict in others] == ["faster", "slower"]


def test_distributions_lie_in_one_chart(runs: list[StoredRun], page: str):
    (shown,) = data_of(Page(page))["loads"]
    curves = {figure["name"]: figure["quantiles"] for figure in shown["figures"] if figure["quantiles"]}
    assert curves.keys() == {"TTFT", "TPOT", "stall", "E2E"}
    medians = [values[100] for values in curves["TPOT"]]
    assert medians[1] < medians[0] < medians[2]
    assert medians[0] == pytest.approx(runs[0].report.points[0].summary.figures["tpot"].percentiles[50.0], rel=1e-3)


def test_settings_that_differ_are_listed_and_the_others_apart(tmp_path: Path):
    other = SLO(ttft_s=2.0)
    data = data_of(Page(comparison_html([stored(tmp_path / "a"), stored(tmp_path / "b", slo=other, server="vllm")])))
    differing = dict(data["settings"])
    assert differing.keys() == {"server", "SLO"}
    assert [text.partition(", ")[2] for text in differing["server"]] == ["powerband 0.1.0", "vllm 0.1.0"]
    assert ["seed", "0"] in data["same"]
    assert any("SLOs differ" in warning for warning in data["warnings"])


def test_settings_in_lists_are_listed_like_others() -> None:
    workload = {"arrivals": {"phases": [{"start": 2.0, "seconds": None}]}, "stages": [{"a": 1}, {"a": 0.5}]}
    flat = dict(_flattened(workload))
    assert flat == {
        "arrivals phases start": "2",
        "arrivals phases seconds": "–",
        "stages 1 a": "1",
        "stages 2 a": "0.5",
    }


def test_runs_whose_folders_have_one_name_are_named_in_full(tmp_path: Path):
    pair = [stored(tmp_path / side / "run") for side in ("a", "b")]
    assert run_names(pair) == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]


def test_hostile_text_stays_text_and_nothing_is_fetched(runs: list[StoredRun], page: str):
    bad = replace(runs[1], report=replace(runs[1].report, command=(HOSTILE,), workload={"name": HOSTILE}))
    plain, attacked = Page(page), Page(comparison_html([runs[0], bad, runs[2]]))
    assert [tag for tag, _ in attacked.elements] == [tag for tag, _ in plain.elements]
    for tag, attributes in attacked.elements:
        assert not {"src", "href", "srcset", "action", "style"} & attributes.keys(), tag
    for path in files("powerband").joinpath("bench", "comparison", "page").iterdir():
        assert not re.search(r"https?:|url\(|@import|fetch\(|innerHTML|outerHTML|\beval\b", path.read_text()), path


def test_the_page_is_part_of_the_package():
    assert '"bench/comparison/page/*"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_runs_without_a_load_in_common_are_refused(tmp_path: Path):
    one, other = stored(tmp_path / "a"), stored(tmp_path / "b")
    several = replace(one, report=replace(one.report, points=(point(rate=1.0), point(rate=2.0))))
    with pytest.raises(UsageError, match="no load in common"):
        comparison_html([several, other])


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_it(page: str, tmp_path: Path):
    path = tmp_path / "compare.html"
    write_page(page, path)
    command = [
        str(CHROMIUM),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'browser'}",
    ]
    command += ["--virtual-time-budget=2000", "--dump-dom", f"file://{path}"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "<html" not in made.stdout:
        pytest.skip(f"the browser does not run here: {made.stderr[-200:]}")
    shown = re.sub(r"<script.*?</script>", "", made.stdout, flags=re.DOTALL)
    assert "quick, slow compared with first" in shown
    assert shown.count("<canvas") == 4
    assert "faster (large)" in shown
