"""What a terminal shows of a plan, and what --json holds of it."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace

import pytest
from results_for_tests import evaluation, results
from rich.console import Console

from powerband.planner.report.json_export import results_as_dict
from powerband.planner.report.table import MAX_ROWS, plan_table, pruned_by_reason
from powerband.planner.results import Evaluation, PlanResults, Prediction, Pruned
from powerband.spec.slo import SLO

HOSTILE = "\x1b[31mmodel\x07 [red] \u202ebackwards"


def shown(found: PlanResults, width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(plan_table(found))
    return file.getvalue()


def test_the_plan_comes_first_with_its_promise_and_its_price():
    text = shown(results())
    assert re.match(r"vLLM on 1 × A100-80G int4 for \$3\.43 an hour keeps the SLO\.\n", text)
    assert "Promise   TTFT p95 623 ms (499–779 ms) of 1.00 s\n" in re.sub(r" +\n", "\n", text)
    assert "$3.43 an hour, $1.51 per million output tokens" in text
    assert "it holds 6.54 (5.84–7.32) requests/s, 3 are asked" in text
    assert text.index("Why") < text.index("Frontier") < text.index("Left out")


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_it_fits_and_is_plain_text_when_piped(width: int):
    found = results(engines=("vllm", "sglang"), model=HOSTILE)
    text = shown(replace(found, pruned=(*found.pruned, Pruned(HOSTILE, HOSTILE)), reasons=(HOSTILE,)), width)
    assert max(map(len, text.splitlines())) <= width
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "[red]" in text, "no markup of rich's"


def frontier_lines(text: str) -> list[str]:
    return text.split("Frontier: ")[1].split("Left out")[0].splitlines()[1:]


def test_the_frontier_is_by_price_and_names_the_choice_and_its_neighbours():
    heading, *rows = frontier_lines(shown(results(), 160))
    prices = [float(row.split()[row.split().index("int4") + 1]) for row in rows if "int4" in row]
    assert prices == sorted(prices)
    roles = [row.split()[0] for row in rows if row[:1].isalpha()]
    assert roles == ["cheaper", "chosen", "faster"]
    assert "TP×PP×n" in heading
    assert "SLO kept" in heading


def test_narrow_terminals_get_fewer_columns_not_cut_ones():
    narrow, wide = (frontier_lines(shown(results(), width)) for width in (80, 160))
    assert len(narrow) == len(wide)
    assert not [line for line in narrow if "…" in line and not line.startswith("… and 6 that miss the SLO")]
    assert set(narrow[0].split()) < set(wide[0].split())


def test_engines_are_a_column_only_where_there_are_several():
    assert " engine " not in shown(results(), 160)
    several = results(engines=("vllm", "sglang"))
    frontier = tuple(replace(one, dominated=False) for one in several.evaluations[:10:3])
    assert " engine " in shown(replace(several, evaluations=frontier, recommended=frontier[0]), 160)


def test_a_long_frontier_is_cut_and_says_so():
    found = results(limits=(32, 64, 128, 256))
    everything = tuple(replace(one, dominated=False, meets_slo=True) for one in found.evaluations)
    text = shown(replace(found, evaluations=everything), 160)
    assert len([line for line in text.splitlines() if "int4" in line and "×" in line]) <= MAX_ROWS + 1
    assert f"… and {len(everything) - MAX_ROWS:,} more (--html and --json show all)" in text


def test_when_nothing_will_do_the_nearest_is_shown():
    text = shown(results(slo=SLO.parse("ttft=1ms"), budget=0.1))
    assert re.match(r"Nothing on offer keeps the SLO within the budget. Nearest is vLLM on ", text)
    assert "Prediction  TTFT p95" in text
    assert "Why not" in text


def test_what_was_left_out_is_counted_by_reason():
    text = shown(results(), 120)
    assert "Left out: 28 deployments" in text
    assert "15 × does not fit (for example vllm on 1 L4, none, TP 1: needs 31.2 GB, has 22.1 GB)" in text
    (first, members), *_ = pruned_by_reason(results().pruned)
    assert (first, len(members)) == ("does not fit", 5)


def test_reasons_that_differ_in_amounts_only_are_one():
    small, smaller = (
        Pruned("L4", f"needs {needs} GB without a KV cache, has 21.4 GB", 2) for needs in ("38.7", "2,138")
    )
    assert pruned_by_reason([small, smaller]) == [("needs … GB without a KV cache, has … GB", [small, smaller])]
    text = shown(replace(results(), pruned=(small, smaller)), 160)
    assert "4 × needs … GB without a KV cache, has … GB (for example L4: needs 38.7 GB without a KV" in text


def endless() -> Evaluation:
    never = Prediction(math.inf, math.inf, math.inf)
    return replace(evaluation(), figures={**evaluation().figures, "ttft_s": never}, usd_per_hour=None)


def test_what_never_ends_and_what_has_no_price_are_shown_as_such():
    found = results()
    row = frontier_lines(shown(replace(found, evaluations=(endless(),), recommended=None, alternatives={})))[1]
    assert row.split().count("–") == 2
    assert "∞" in row


def test_json_holds_everything_under_names_with_units():
    found = results()
    told = json.loads(json.dumps(results_as_dict(found), allow_nan=False))
    assert told["schema"] == "powerband.findings/1"
    assert len(told["evaluations"]) == len(found.evaluations)
    chosen = told["evaluations"][told["recommended"]]
    assert chosen["name"] == "vLLM on 1 × A100-80G int4"
    assert chosen["figures"]["capacity_requests_per_s"]["low"] == pytest.approx(5.84, abs=0.01)
    assert chosen["pools"][0]["replica"]["max_num_batched_tokens"] == 2048
    assert told["evaluations"][told["alternatives"]["faster"]]["usd_per_hour"] > chosen["usd_per_hour"]
    assert sum(one["count"] for one in told["pruned"]) == 28
    assert told["budget_usd_per_hour"] == 5.0


def test_json_has_null_for_what_never_ends():
    told = results_as_dict(replace(results(), evaluations=(endless(),), recommended=None, alternatives={}))
    assert told["evaluations"][0]["figures"]["ttft_s"] == {"value": None, "low": None, "high": None}
    assert (told["recommended"], told["evaluations"][0]["usd_per_million_tokens"]) == (None, None)
