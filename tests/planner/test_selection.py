"""What is chosen, cheaper and on the frontier, where the prices of some devices are not known."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest
from results_for_tests import SLO_, evaluation, results
from rich.console import Console

from powerband.planner.plan_request import PlanRequest
from powerband.planner.report.reasons import reasons
from powerband.planner.report.table import plan_table
from powerband.planner.results import Evaluation
from powerband.planner.selection import alternatives, marked, order, recommended


class _Asked:
    """What selection reads of a PlanRequest."""

    budget_usd_per_h: float | None = None
    objective = "cost"
    slo = SLO_


ASKED = cast(PlanRequest, _Asked())


def meeting(device: str, count: int, usd_per_hour: float | None) -> Evaluation:
    return replace(evaluation(device, count), usd_per_hour=usd_per_hour, meets_slo=True, method="simulation")


PRICED, DEARER, UNPRICED = meeting("L4", 4, 3.2), meeting("A10G", 4, 4.0), meeting("H100", 1, None)


@pytest.mark.parametrize("offered", [[PRICED, UNPRICED], [UNPRICED, PRICED]])
def test_what_has_no_price_is_not_chosen_by_cost_where_another_has_one(offered: Sequence[Evaluation]) -> None:
    assert recommended(ASKED, offered) is PRICED
    assert min(offered, key=lambda one: order("cost", one)) is PRICED


def test_what_has_no_price_is_no_cheaper_alternative() -> None:
    assert alternatives(ASKED, PRICED, [PRICED, UNPRICED]).get("cheaper") is None
    assert alternatives(ASKED, DEARER, [PRICED, DEARER, UNPRICED])["cheaper"] is PRICED


def test_a_budget_and_a_missing_price_do_not_go_together() -> None:
    asked = _Asked()
    asked.budget_usd_per_h = 100.0
    assert recommended(cast(PlanRequest, asked), [UNPRICED]) is None
    assert alternatives(cast(PlanRequest, asked), None, [UNPRICED, PRICED])["nearest"] is PRICED


def test_of_devices_without_any_price_the_fewest_are_chosen() -> None:
    more = meeting("H100", 2, None)
    assert recommended(ASKED, [more, UNPRICED]) is UNPRICED


def test_a_price_and_a_missing_price_do_not_dominate_each_other() -> None:
    slow, fast = replace(PRICED, figures=evaluation("L4", 4).figures), UNPRICED
    assert fast.figures["ttft_s"].value < slow.figures["ttft_s"].value
    assert [one.dominated for one in marked([slow, fast])] == [False, False]


def test_the_reasons_name_what_could_not_be_compared_and_how_to_give_a_price() -> None:
    found = reasons(PRICED, [PRICED, UNPRICED], {}, slo=SLO_, rate=3.0, budget_usd_per_h=None, unpriced=["H100"])
    assert found[-1] == (
        "No price of H100 is known: it is chosen only where nothing with a price would do. "
        "--set H100.price=DOLLARS or --prices gives one."
    )
    priced = reasons(PRICED, [PRICED, DEARER], {}, slo=SLO_, rate=3.0, budget_usd_per_h=None, unpriced=["T4"])
    assert not [sentence for sentence in priced if "No price" in sentence]


def _printed(chosen: Evaluation, **origins: str) -> str:
    file = io.StringIO()
    Console(file=file, width=160).print(plan_table(replace(results(), recommended=chosen, price_origins=origins)))
    return file.getvalue()


def test_a_plan_without_a_price_says_so_and_one_with_a_price_says_where_it_is_from() -> None:
    assert "(no price is known) keeps the SLO." in _printed(UNPRICED)
    shown = _printed(replace(PRICED, machines={"ours": 4}), ours="a contract; 2026")
    assert "4 × ours: a contract; 2026" in shown
