"""What the page of a plan needs to answer for other rates, limits and numbers of replicas, and to write plan files.

curves       [{capacity, ttft_s, tpot_s: of [predicted, slow, fast], e2e_mean_s: slow, output, output_of_arrival,
               prices: its place in `prices`, name, id, devices, device, layout: with their count left out}]
prices       of each machine and layout: of 1, 2, … replicas [dollars an hour, machines, where prices come from]
plan         {head, workload: YAML; slo, objective, command: without what is asked again, rate, slo_text: as given}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from powerband.planner.picked import deployment_id, replica_id
from powerband.planner.rate_curves import DeploymentPrice, RateCurve, curve_points
from powerband.planner.report.formatting import engine_text, price_lines, replica_text
from powerband.planner.report.json_export import finite
from powerband.planner.results import Evaluation, PlanResults
from powerband.spec.plan import VERSION, absolute_model
from powerband.spec.yaml_codec import as_record

_ASKED_AGAIN = ("--rate", "--slo")
_OUTPUTS = ("--out", "-o", "--html", "--workers", "--pick")
_SWITCHES = ("--json", "--no-json")
Number = Callable[[str], int]  # a text's place among the texts of the page


class WhatIfData:
    """Collects what evaluations share, in the order in which they come."""

    def __init__(self, number: Number, origins: Mapping[str, str]) -> None:
        self._number, self._origins = number, origins
        self._places: dict[int, int] = {}
        self._price_places: dict[int, int] = {}
        self.curves: list[dict[str, Any]] = []
        self.prices: list[list[Any]] = []

    def of(self, one: Evaluation) -> dict[str, Any]:
        """An evaluation's own part."""
        deployment = yaml.safe_dump({"deployment": as_record(one.deployment, complete=True)}, sort_keys=False)
        own: dict[str, Any] = {
            "id": deployment_id(one.deployment),
            "count": one.deployment.pools[0].count if len(one.deployment.pools) == 1 else None,
            "machines": [(name, count) for name, count in one.machines.items()],
            "prices": [self._number(line) for line in price_lines(one.machines, self._origins)],
            # By the number of its text, with one replica: of other numbers only the count differs.
            "deployment": self._number(_with_one(deployment, one)),
            "simulated": [(one.rate, [_rounded(pair) for pair in one.kept_limits]) for one in one.simulated],
        }
        if one.curve is not None:
            own["curve"] = self._curve(one, one.curve)
            own["factors"] = [round(one.corrections.get(name, 1.0), 6) for name in ("ttft_s", "tpot_s", "e2e_mean_s")]
        return own

    def _curve(self, one: Evaluation, curve: RateCurve) -> int:
        place = self._places.get(id(curve))
        if place is not None:
            return place
        replica, engine = one.deployment.pools[0].replica, one.deployment.engine
        speeds = (curve.predicted, curve.slow, curve.fast)
        self.curves.append(
            {
                "capacity": [_short(speed.capacity) for speed in speeds],
                "ttft_s": [_rounded(speed.ttft_s) for speed in speeds],
                "tpot_s": [_rounded(speed.tpot_s) for speed in speeds],
                "e2e_mean_s": _rounded(curve.slow.e2e_mean_s),
                "output": curve.output,
                "output_of_arrival": curve.output_of_arrival,
                "prices": self._prices(curve.prices),
                "name": [f"{engine_text(one.deployment)} on ", f" × {replica_text(replica)}"],
                "id": [f"{engine}-", f"x{replica_id(replica)}"],
                "devices": replica.num_devices,
                "device": replica.device,
                "layout": f"{replica.tensor_parallel}×{replica.pipeline_parallel}×",
            }
        )
        return self._places.setdefault(id(curve), len(self.curves) - 1)

    def _prices(self, prices: Sequence[DeploymentPrice]) -> int:
        place = self._price_places.get(id(prices))
        if place is None:
            self.prices.append([self._price(one) for one in prices])
            place = self._price_places[id(prices)] = len(self.prices) - 1
        return place

    def _price(self, one: DeploymentPrice) -> tuple[float | None, list[tuple[str, int]], list[int]]:
        origins = [self._number(line) for line in price_lines(one["machines"], self._origins)]
        return one["usd_per_hour"], list(one["machines"].items()), origins


def plan_data(results: PlanResults, command: Sequence[str]) -> dict[str, Any]:
    """What all plan files and commands of the page have in common."""
    command = command or ("powerband", "plan", results.model)
    rest, given = _without_options(command)
    dump = yaml.safe_dump
    return {
        "head": dump({"version": VERSION, "model": absolute_model(results.model)}, sort_keys=False, allow_unicode=True),
        "workload": dump({"workload": dict(results.workload)}, sort_keys=False, allow_unicode=True),
        "slo": results.slo.as_dict(),
        "objective": results.objective,
        "command": rest,
        "rate": given.get("--rate"),
        "slo_text": given.get("--slo"),
        "points": curve_points(results.slo.attainment),
    }


def _with_one(text: str, one: Evaluation) -> str:
    count = one.deployment.pools[0].count
    return text.replace(f"    count: {count}\n", "    count: 1\n") if len(one.deployment.pools) == 1 else text


def _without_options(command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """A command line without its outputs, rate and SLO; and the values of the last two."""
    rest: list[str] = []
    given: dict[str, str] = {}
    arguments = iter(command)
    for argument in arguments:
        name, sign, value = argument.partition("=")
        if name in (*_ASKED_AGAIN, *_OUTPUTS):
            value = value if sign else next(arguments, "")
            given[name] = value
        elif argument not in _SWITCHES:
            rest.append(argument)
    return rest, given


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [_short(value) for value in values]


def _short(value: float) -> float | None:
    """None: it never ends."""
    known = finite(value)
    return None if known is None else float(f"{known:.6g}")
