"""Two runs side by side: what is told apart, what is not, and what makes it unfair."""

from __future__ import annotations

import io
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from samples_for_tests import load, point, report
from scipy import stats

from powerband.bench.load import LoadResult
from powerband.bench.report import result_files
from powerband.bench.report.compare import compare, compare_samples
from powerband.bench.report.compare_table import comparison_table
from powerband.bench.report.result_files import write_run
from powerband.bench.report.results import RunReport
from powerband.errors import UsageError
from powerband.spec.slo import SLO


def median_difference(x, y, axis):
    return np.median(y, axis=axis) - np.median(x, axis=axis)


def written(folder: Path, *results: LoadResult, run: RunReport | None = None, rate: float = 6.0) -> Path:
    write_run(run or report(*(point(result, rate) for result in results)), results, folder)
    return folder


def test_the_same_server_twice_shows_no_difference(tmp_path: Path):
    a, b = (written(tmp_path / str(seed), load(requests=700, noise_seed=seed)) for seed in (1, 2))
    (one,) = compare(a, b).points
    assert one.paired
    assert one.figures["ttft"].count_a == one.figures["ttft"].count_b > 500
    assert {one.figures[name].median.verdict for name in ("ttft", "tpot", "e2e")} == {"no difference shown"}
    assert one.figures["tpot"].effect == "negligible"


def test_a_server_slower_by_a_fifth_is_slower_and_the_other_way_round_faster(tmp_path: Path):
    a, b = written(tmp_path / "a", load(requests=700)), written(tmp_path / "b", load(requests=700, slowness=1.2))
    (there,), (back,) = compare(a, b).points, compare(b, a).points
    tpot = there.figures["tpot"]
    assert (tpot.median.verdict, back.figures["tpot"].median.verdict) == ("slower", "faster")
    assert tpot.median.ratio == pytest.approx(1.25, abs=0.08)
    assert tpot.median.interval_s is not None
    assert tpot.median.interval_s[0] < (tpot.median.b_s or 0) - (tpot.median.a_s or 0) < tpot.median.interval_s[1]
    assert tpot.p99.verdict == "slower"
    assert tpot.delta == pytest.approx(-(back.figures["tpot"].delta or 0))


@pytest.mark.parametrize("number", [-1, 1, 10**8, 10**30])
def test_a_request_of_a_point_that_the_run_lacks_is_an_error(number: int, tmp_path: Path):
    folder = written(tmp_path / "a", load(requests=40))
    file = folder / "requests.jsonl"
    line, *others = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(line) | {"point": number}), *others]))
    with pytest.raises(UsageError, match=r"requests\.jsonl is broken: line 1: "):
        compare(folder, folder)


@pytest.mark.parametrize("name", ["run.json", "requests.jsonl"])
def test_only_regular_files_of_bounded_size_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = written(tmp_path / "a", load(requests=40))
    file = folder / name
    for limit in ("_MAX_RUN_BYTES", "_MAX_REQUESTS_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(result_files, limit, 100)
            with pytest.raises(UsageError, match=r"100 are read at most"):
                compare(folder, folder)
    file.rename(tmp_path / "kept")
    file.symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=f"{name} is not a regular file"):
        compare(folder, folder)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UsageError, match=f"{name} is not a regular file"):
        compare(folder, folder)


def test_a_line_that_does_not_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = written(tmp_path / "a", load(requests=40))
    monkeypatch.setattr(result_files, "_MAX_LINE_BYTES", 100)
    with pytest.raises(UsageError, match="a line of more than 100 bytes"):
        compare(folder, folder)


def test_different_seeds_are_compared_unpaired_and_with_a_warning(tmp_path: Path):
    a, b = written(tmp_path / "a", load()), written(tmp_path / "b", load(seed=1))
    comparison = compare(a, b)
    assert not comparison.points[0].paired
    assert comparison.warnings == ("The seeds differ (0 and 1).",)


def test_a_longer_run_of_the_same_seed_is_paired_as_far_as_both_go(tmp_path: Path):
    a, b = written(tmp_path / "a", load(requests=200)), written(tmp_path / "b", load(requests=300))
    comparison = compare(a, b)
    assert comparison.points[0].paired
    assert comparison.points[0].figures["ttft"].count_a < 200


def test_what_makes_it_unfair_is_said(tmp_path: Path):
    fair, late = load(), load(lag_s=0.05)
    run = report(point(late, slo=SLO(ttft_s=1.0)), slo=SLO(ttft_s=1.0))
    run = replace(
        run, target=replace(run.target, model="other", endpoint="chat"), workload={**run.workload, "name": "x"}
    )
    comparison = compare(written(tmp_path / "a", fair), written(tmp_path / "b", late, run=run))
    text = "\n".join(comparison.warnings)
    for part in ("workloads differ", "SLOs differ", "models differ (demo and other)", "endpoints differ", "INVALID"):
        assert part in text
    file = io.StringIO()
    Console(file=file, width=80).print(comparison_table(comparison))
    assert file.getvalue().count("Not a fair comparison:") == len(comparison.warnings) == 5


def test_loads_are_matched_by_what_was_offered(tmp_path: Path):
    def sweep(rates: tuple[float, ...]) -> tuple[RunReport, list[LoadResult]]:
        loads = [load(rate, 60) for rate in rates]
        return report(*(point(one, rate) for one, rate in zip(loads, rates, strict=True))), loads

    for name, rates in (("a", (2.0, 4.0, 8.0)), ("b", (8.0, 2.0))):
        run, loads = sweep(rates)
        written(tmp_path / name, *loads, run=run)
    comparison = compare(tmp_path / "a", tmp_path / "b")
    assert [one.label for one in comparison.points] == ["2/s", "8/s"]
    assert comparison.points[0].figures["ttft"].median.ratio == 1.0
    assert "1 of the loads are in one run only, and left out." in comparison.warnings


def test_runs_without_a_load_in_common_are_an_error(tmp_path: Path):
    for name, rates in (("a", (2.0, 4.0)), ("b", (1.0, 3.0))):
        loads = [load(rate, 60) for rate in rates]
        run = report(*(point(one, rate) for one, rate in zip(loads, rates, strict=True)))
        written(tmp_path / name, *loads, run=run)
    with pytest.raises(UsageError, match="no load in common: 2 requests/s, 4 requests/s; 1 requests/s, 3 requests/s"):
        compare(tmp_path / "a", tmp_path / "b")


def test_it_is_json(tmp_path: Path):
    a, b = written(tmp_path / "a", load(requests=60)), written(tmp_path / "b", load(requests=60, slowness=1.1))
    told = json.loads(json.dumps(compare(a, b).as_dict(), allow_nan=False))
    assert told["schema"] == "powerband.bench.compare/1"
    assert told["points"][0]["figures"]["tpot"]["median"]["ratio"] > 1
    assert told["points"][0]["figures"]["tpot"]["p99"]["verdict"] == "too few requests"


def test_the_table_fits_in_80_columns(tmp_path: Path):
    a, b = written(tmp_path / "a", load(requests=700)), written(tmp_path / "b", load(requests=700, slowness=1.5))
    file = io.StringIO()
    Console(file=file, width=80).print(comparison_table(compare(a, b)))
    assert max(map(len, file.getvalue().splitlines())) <= 80
    assert "…" not in file.getvalue()
    assert "slower (large)" in file.getvalue()


def test_the_interval_agrees_with_scipy_where_requests_are_independent():
    generator = random.Random(3)
    a = [generator.lognormvariate(0, 0.5) for _ in range(400)]
    b = [value * generator.lognormvariate(0.05, 0.2) for value in a]
    for paired in (False, True):
        ours = compare_samples(a, b, paired=paired).median.interval_s
        theirs = stats.bootstrap(
            (a, b),
            median_difference,
            paired=paired,
            vectorized=True,
            method="percentile",
            n_resamples=2000,
            rng=1,
        ).confidence_interval
        assert ours == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_neighbours_that_wait_together_widen_the_interval():
    """Two halves of one noisy hour: independent draws would call any two of them different."""
    generator = random.Random(5)
    level, a, b = [0.0], [], []
    for side in (a, b):
        for _ in range(2000):
            level.append(0.95 * level[-1] + generator.gauss(0, 1))
            side.append(10 + level[-1])
    interval = compare_samples(a, b, paired=False).median.interval_s
    independent = stats.bootstrap(
        (a, b),
        median_difference,
        vectorized=True,
        method="percentile",
        n_resamples=500,
        rng=1,
    ).confidence_interval
    assert interval is not None
    assert interval[1] - interval[0] > 2 * (independent.high - independent.low)
