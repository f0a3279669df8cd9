"""A Plan: all that reproduces a deployment and what it promises, in one YAML file.

model       what is served
deployment  engine and pools of replicas: device, layout, precision, limits (spec.deployment); absent in a plan that was
            written by hand only to check a promise
workload    what it was made for (spec.workload.Workload.as_dict)
slo         what its users may expect (spec.slo.SLO.as_dict)
promise     rate: requests a second at which the SLO is kept; output_tokens_per_s: at least, at that rate
predicted   figures at that rate, each with the range that holds nine measurements in ten
cost        dollars per hour, the machines that they pay for, and where predictions and prices come from
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from powerband.documents import read_table
from powerband.errors import EnvironmentFault, UsageError
from powerband.folders import expand_user
from powerband.spec.config_reader import shown
from powerband.spec.deployment import Deployment, local_name
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import OpenLoop
from powerband.spec.workload.workload import RequestTrace, Workload
from powerband.spec.yaml_codec import as_record, read_record

VERSION = 1
Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class Promise:
    """The load at which a plan meets its SLO."""

    rate: float  # requests per second
    output_tokens_per_s: float | None = None  # at least; None: not guaranteed

    def __post_init__(self) -> None:
        for name in ("rate", "output_tokens_per_s"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value < math.inf):
                raise UsageError(f"promise has {name}: {value!r}.", hint="It must be a number above 0.", param="plan")


@dataclass(frozen=True, slots=True)
class Prediction:
    """A prediction with the range that holds nine measurements in ten."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCost:
    """What a deployment costs."""

    usd_per_hour: float  # of all machines
    usd_per_million_tokens: float  # of output
    machines: Mapping[str, int]  # how many of each, by name


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A deployment with its workload, its SLO and what it guarantees."""

    model: str
    workload: Workload
    slo: SLO  # its attainment is part of the promise
    promise: Promise
    deployment: Deployment | None = None
    predicted: Mapping[str, Prediction] = field(default_factory=dict)  # by name, see planner.results.Evaluation
    cost: PlanCost | None = None

    @property
    def arrivals(self) -> OpenLoop:
        """At the promised rate, as bursty as the workload."""
        known = self.workload.arrivals
        return OpenLoop.at(self.promise.rate, known.burstiness if isinstance(known, OpenLoop) else 1.0)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], trace: RequestTrace | None = None) -> Plan:
        """Raises UsageError for what is missing, unknown or wrong."""
        unknown = set(values) - {"version", *(item.name for item in fields(cls))}
        if unknown or values.get("version") != VERSION:
            names = ", ".join(sorted(map(shown, unknown))[:8])
            what = f"unknown: {names}" if unknown else f"version {shown(values.get('version'))}"
            raise UsageError(
                f"This is not a valid plan: {what}.", hint=f"This is version {VERSION} of the format.", param="plan"
            )
        try:
            return cls(
                model=str(values["model"]),
                workload=Workload.from_dict(values["workload"], trace),
                slo=SLO.from_dict(values["slo"]),
                promise=Promise(**values["promise"]),
                deployment=_deployment(values),
                predicted={
                    str(name): read_record(Prediction, figure, f"plan: predicted: {name}")
                    for name, figure in values.get("predicted", {}).items()
                },
                cost=_optional(PlanCost, values, "cost"),
            )
        except (KeyError, TypeError, AttributeError) as problem:
            raise UsageError(f"This is not a valid plan: {problem} is missing or wrong.", param="plan") from None

    def as_dict(self) -> dict[str, Any]:
        values = {
            "version": VERSION,
            "model": self.model,
            "deployment": as_record(self.deployment, complete=True),
            "workload": self.workload.as_dict(),
            "slo": self.slo.as_dict(),
            "promise": as_record(self.promise),
            "predicted": as_record(self.predicted),
            "cost": as_record(self.cost),
        }
        return {name: value for name, value in values.items() if value}


def _deployment(values: Mapping[str, Any]) -> Deployment | None:
    deployment = _optional(Deployment, values, "deployment")
    if deployment is None:
        return None
    pools = (
        replace(pool, replica=replace(pool.replica, device=local_name(pool.replica.device)))
        for pool in deployment.pools
    )
    return replace(deployment, pools=tuple(pools))


def _optional(kind: type[Record], values: Mapping[str, Any], name: str) -> Record | None:
    return None if values.get(name) is None else read_record(kind, values[name], f"plan: {name}")


def absolute_model(model: str) -> str:
    """A model on this machine by its absolute path, so that a plan does not depend on where it was made; any other, and
    'demo', as it is.
    """
    path = expand_user(model)
    return str(path.absolute()) if model != "demo" and path.exists() else model


def read_plan(path: Path, trace: RequestTrace | None = None) -> Plan:
    """Raises EnvironmentFault when it cannot be read, UsageError when it is no plan."""
    if not path.exists():
        hint = "'powerband plan MODEL -o plan.yaml' writes one."
        raise EnvironmentFault(f"Cannot read {path}: No such file or directory.", hint=hint, param="plan")
    return Plan.from_dict(read_table(path, "plan", param="plan"), trace)


def write_plan(plan: Plan, path: Path) -> None:
    """Raises EnvironmentFault."""
    try:
        path.write_text(yaml.safe_dump(plan.as_dict(), sort_keys=False, allow_unicode=True))
    except OSError as problem:
        raise EnvironmentFault(f"Cannot write {path}: {problem.strerror}.", param="plan") from None
