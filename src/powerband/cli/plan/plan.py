"""`powerband plan`: which deployment to choose, from predictions alone."""

from __future__ import annotations

import json as json_format
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from powerband.cli.flags import Json
from powerband.cli.load_options import MixOptions
from powerband.cli.plan.devices import PRICES_HELP, PROVIDER_HELP
from powerband.cli.plan.inputs import measured_devices, read_model
from powerband.cli.progress import progress_bar
from powerband.errors import EnvironmentFault, UsageError
from powerband.spec.deployment import ENGINES, parse_engines, parse_quantizations
from powerband.spec.hardware.what_if import pinned_settings
from powerband.spec.quantities import dollars_per_hour, share
from powerband.spec.slo import SLO
from powerband.spec.workload.fitting import MIN_MODEL_LEN
from powerband.spec.workload.options import chosen_workload

if TYPE_CHECKING:
    from powerband.planner.plan_request import PlanRequest
    from powerband.planner.results import PlanResults

NO_PLAN = 1
DEFAULT_SLO = "ttft=2s@p95,tpot=100ms@p95"
_ASKED = Group("Requirements", sort_key=0)
_OFFERED = Group("Hardware", sort_key=1)
_OUTPUT = Group("Output", sort_key=5)


def _flag(group: Group, *names: str, help: str) -> Parameter:
    return Parameter(name=names or None, help=help, group=group, negative="", show_default=False)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RequirementFlags:
    rate: Annotated[float | None, _flag(_ASKED, help="Requests a second; default: the trace's own")] = None
    slo: Annotated[str, _flag(_ASKED, help=f"Limits and percentile; default: {DEFAULT_SLO}")] = DEFAULT_SLO
    budget: Annotated[str | None, _flag(_ASKED, help="Dollars: 4/h, 100/day, 2900/month")] = None
    objective: Annotated[
        Literal["cost", "latency", "throughput"],
        _flag(_ASKED, help="How to choose among deployments that meet the SLO; default: cost"),
    ] = "cost"
    seed: Annotated[int, _flag(_ASKED, help="Random seed of the simulated requests; default: 0")] = 0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class HardwareFlags:
    devices: Annotated[
        str, _flag(_OFFERED, help="Names in the catalog, local (this machine), or FILE.yaml; default: local")
    ] = "local"
    max_devices: Annotated[int, _flag(_OFFERED, help="Total over all kinds; default: 8")] = 8
    replicas: Annotated[
        int | None, _flag(_OFFERED, help="Number of replicas; default: the fewest that meet the SLO")
    ] = None
    engine: Annotated[str, _flag(_OFFERED, help=f"{', '.join(ENGINES)}; default: powerband,vllm")] = "powerband,vllm"
    quantization: Annotated[
        str, _flag(_OFFERED, help="none, fp8, int8, w8a8, int4, nvfp4; auto (default): all that a device supports")
    ] = "auto"
    max_model_len: Annotated[
        int | None, _flag(_OFFERED, help="Maximum prompt plus output, in tokens; default: the workload's maximum")
    ] = None
    draft_tokens: Annotated[int, _flag(_OFFERED, help="Speculative decoding: draft tokens per step")] = 0
    acceptance: Annotated[
        str | None, _flag(_OFFERED, help="... and the fraction of them that is accepted, e.g. 70%")
    ] = None
    prices: Annotated[Path | None, _flag(_OFFERED, help=PRICES_HELP)] = None
    provider: Annotated[str | None, _flag(_OFFERED, help=PROVIDER_HELP)] = None
    set: Annotated[
        list[str] | None,
        _flag(_OFFERED, help="What if: device.memory_bytes=48e9, L4.price=0.5, replica.max_num_seqs=64"),
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PlanOutputFlags:
    out: Annotated[Path | None, _flag(_OUTPUT, "--out", "-o", help="Write the plan, as YAML")] = None
    pick: Annotated[
        str | None,
        _flag(
            _OUTPUT,
            help="Whose plan: recommended (default), cheaper, faster, nearest; or an id from --html or --json: then "
            "only this deployment is looked at",
        ),
    ] = None
    html: Annotated[Path | None, _flag(_OUTPUT, help="Write a report with the frontier: one file, offline")] = None
    json: Annotated[Json, Parameter(group=_OUTPUT)] = False
    workers: Annotated[int | None, _flag(_OUTPUT, help="Processes; default: all cores")] = None


# The flags' class, the flag, and its least value.
_MINIMUMS = (
    (RequirementFlags, "seed", 0),
    (HardwareFlags, "max_devices", 1),
    (HardwareFlags, "replicas", 1),
    (HardwareFlags, "max_model_len", 1),
    (HardwareFlags, "draft_tokens", 0),
)


def plan(
    model: Annotated[str, Parameter(help="Hugging Face id, folder, config.json, or 'demo'")],
    /,
    *,
    need: RequirementFlags | None = None,
    requests: MixOptions | None = None,
    offer: HardwareFlags | None = None,
    output: PlanOutputFlags | None = None,
) -> int:
    """Predict deployments of MODEL and recommend one.

    Runs nothing and needs no device: a performance model predicts the time of each step, and the
    engine's own scheduler runs the workload in virtual time.
    Exits with 1 if no deployment meets the SLO within the budget.
    """
    need, offer, output = need or RequirementFlags(), offer or HardwareFlags(), output or PlanOutputFlags()
    _check_outputs(output)
    plan_request = plan_request_from(model, need, requests or MixOptions(), offer)
    plan_request = replace(plan_request, pick=output.pick)
    results = search_with_progress(plan_request, output.workers, quiet=output.json)
    return _print_results(results, plan_request, output)


def plan_request_from(model: str, need: RequirementFlags, requests: MixOptions, offer: HardwareFlags) -> PlanRequest:
    """Raises UsageError or EnvironmentFault for what cannot be asked."""
    from powerband.planner.plan_request import PlanRequest, fit_to_context

    slo = SLO.parse(need.slo)
    if not slo.limits:
        raise UsageError("The SLO limits nothing.", hint="Like: --slo ttft=1s@p95,tpot=60ms@p95.", param="slo")
    for flags, name, low in _MINIMUMS:
        value = getattr(need if flags is RequirementFlags else offer, name)
        if value is not None and not value >= low:
            raise UsageError(f"{name} is {value}; it must be at least {low}.", param=name)
    if (offer.acceptance is None) != (offer.draft_tokens == 0):
        raise UsageError("--draft-tokens and --acceptance go together.", param="acceptance")
    engines, quantizations = parse_engines(offer.engine), parse_quantizations(offer.quantization)
    budget = dollars_per_hour(need.budget) if need.budget is not None else None
    acceptance = share(offer.acceptance, param="acceptance") if offer.acceptance is not None else 0.0
    changes = offer.set or []
    pinned = pinned_settings(changes)
    workload, rate = chosen_workload(requests, rate=need.rate)
    spec, stored = read_model(model)
    asked_len = _context(offer.max_model_len or pinned.get("max_model_len"), spec.max_position)
    workload = fit_to_context(workload, need.seed, asked_len or spec.max_position, is_strict=requests.strict_lengths)
    return PlanRequest(
        model=model,
        spec=spec,
        stored=stored,
        engines=engines,
        workload=workload,
        rate=rate,
        slo=slo,
        budget_usd_per_h=budget,
        max_devices=offer.max_devices,
        replicas=offer.replicas,
        quantizations=quantizations,
        max_model_len=asked_len or workload.max_model_len or spec.max_position,
        objective=need.objective,
        draft_tokens=offer.draft_tokens,
        draft_acceptance=acceptance,
        pinned=pinned,
        seed=need.seed,
        # Last: a machine that has not been calibrated must not hide a typo.
        profiles=measured_devices(offer.devices, offer.prices, changes, offer.replicas, offer.provider),
    )


def _context(asked: int | None, known: int) -> int | None:
    """Raises UsageError."""
    if asked is not None and not MIN_MODEL_LEN <= asked <= known:
        raise UsageError(
            f"max_model_len is {asked}; the model knows {known:,} positions.",
            hint=f"It lies between {MIN_MODEL_LEN} and {known}.",
            param="max_model_len",
        )
    return asked


def search_with_progress(plan_request: PlanRequest, workers: int | None, *, quiet: bool) -> PlanResults:
    """With its progress on stderr."""
    from powerband.planner.search import search

    with progress_bar(quiet=quiet) as report:
        return search(
            plan_request, workers=workers, progress=lambda done, total, text: report(text, done / max(total, 1))
        )


def _print_results(results: PlanResults, plan_request: PlanRequest, output: PlanOutputFlags) -> int:
    from rich.console import Console

    from powerband.planner.picked import picked
    from powerband.planner.report.formatting import deployment_text
    from powerband.planner.report.html_report import write_report
    from powerband.planner.report.json_export import results_as_dict
    from powerband.planner.report.table import plan_table
    from powerband.planner.selection import plan_from
    from powerband.spec.plan import write_plan

    chosen = results.recommended if output.pick is None else picked(output.pick, results)
    if output.html is not None:
        write_report(results, output.html, command=("powerband", *sys.argv[1:]))
    if output.json:
        print(json_format.dumps(results_as_dict(results), indent=1))
    else:
        Console().print(plan_table(results))
    if chosen is not None and output.out is not None:
        write_plan(plan_from(plan_request, chosen), output.out)
    elif output.out is not None:
        print(f"Nothing was written to {output.out}: no deployment keeps the SLO.", file=sys.stderr)
    if chosen is not None and (output.out is not None or output.html is not None):
        _print_paths(output)
    if chosen is None or not chosen.meets_slo:
        if chosen is not None:
            print(f"{deployment_text(chosen.deployment)} misses the SLO.", file=sys.stderr)
        return NO_PLAN
    return 0


def _print_paths(output: PlanOutputFlags) -> None:
    written = [f"{what}: {path}" for what, path in (("plan", output.out), ("report", output.html)) if path is not None]
    print("\n".join(written), file=sys.stderr if output.json else sys.stdout)


def _check_outputs(output: PlanOutputFlags) -> None:
    """Before the search, not after it. Raises EnvironmentFault and UsageError."""
    if output.workers is not None and output.workers < 1:
        raise UsageError(f"workers is {output.workers}; it must be at least 1.", param="workers")
    for path in (output.out, output.html):
        if path is not None and not path.absolute().parent.is_dir():
            raise EnvironmentFault(f"Cannot write {path}: there is no such folder.", param="out")
