"""`powerband deploy`: carry a plan out on this machine, and prove its promise."""

from __future__ import annotations

import contextlib
import json as json_format
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from powerband.cli.bench.options import MixFlags
from powerband.cli.flags import Json
from powerband.cli.plan.plan import NO_PLAN, HardwareFlags, RequirementFlags
from powerband.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from powerband.cli.service.view import ServiceProgress
    from powerband.fleet.release import BuiltRelease
    from powerband.fleet.service.spec import GatewaySpec, Policy, ServiceSpec
    from powerband.fleet.service.status import ServiceStatus
    from powerband.fleet.service.store import ServiceStore
    from powerband.fleet.verify import Verification
    from powerband.spec.plan import Plan

SLO_BROKEN = 1
DEFAULT_VERIFY_S = 60.0
_SERVICE = Group("Service", sort_key=2)
_PROVING = Group("Proving", sort_key=3)


def _flag(group: Group, *names: str, help: str) -> Parameter:
    # A value may begin with a hyphen: arguments for others do.
    return Parameter(
        name=names or None, help=help, group=group, negative="", show_default=False, allow_leading_hyphen=True
    )


def _old_flag() -> Parameter:
    """A name that an option had in the version before: it still works, with a warning."""
    return Parameter(group=_SERVICE, negative="", show=False)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServiceFlags:
    name: Annotated[str | None, _flag(_SERVICE, help="Of the service; default: the model's")] = None
    served_model_name: Annotated[str, _flag(_SERVICE, help="Name in the API; default: MODEL as given")] = ""
    host: Annotated[str, _flag(_SERVICE, help="Address of the gateway; default: 127.0.0.1")] = "127.0.0.1"
    port: Annotated[int | None, _flag(_SERVICE, help="Of the gateway; default: 8000, or a free one")] = None
    auth: Annotated[
        Literal["open", "keys"] | None,
        _flag(_SERVICE, help="open: no key is needed (default on loopback); keys: every request needs one"),
    ] = None
    threads: Annotated[int | None, _flag(_SERVICE, help="CPU threads of a replica; default: a fair part")] = None
    max_surge: Annotated[
        int | None, _flag(_SERVICE, help="Extra replicas during a rollout: 0 or 1; default: 1 if memory allows")
    ] = None
    surge: Annotated[int | None, _old_flag()] = None
    drain_timeout: Annotated[str, _flag(_SERVICE, help="For running requests to end; default: 120s")] = "120s"
    start_timeout: Annotated[str, _flag(_SERVICE, help="For a replica to become ready; default: 30min")] = "30min"
    auto_remediate: Annotated[bool, _flag(_SERVICE, help="Carry out the actions that the monitor suggests")] = False
    auto: Annotated[bool, _old_flag()] = False
    webhook: Annotated[str, _flag(_SERVICE, help="URL for notifications of incidents")] = ""
    gateway_args: Annotated[
        str, _flag(_SERVICE, help="Settings of the gateway, e.g. '--default-deadline-s 2'; see 'powerband gateway'")
    ] = ""
    engine_command: Annotated[
        str, _flag(_SERVICE, help="How the engine is started, e.g. '/opt/vllm/bin/vllm'; default: found")
    ] = ""
    engine_args: Annotated[str, _flag(_SERVICE, help="Arguments for the engine, after the plan's")] = ""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class VerifyFlags:
    verify: Annotated[
        bool | None,
        Parameter(
            help="Load the service as the plan says, and compare; default: when something has changed",
            group=_PROVING,
            show_default=False,
        ),
    ] = None
    verify_seconds: Annotated[float, _flag(_PROVING, help="How long; default: 60")] = DEFAULT_VERIFY_S
    strict: Annotated[bool, _flag(_PROVING, help="Go back to what was there when the promise is broken; exit 1")] = (
        False
    )
    report: Annotated[Path | None, _flag(_PROVING, help="Write the load's report: one HTML file, offline")] = None
    json: Annotated[Json, Parameter(group=_PROVING)] = False


@dataclass(frozen=True, slots=True)
class ExistingService:
    """What there was of a service before this call. has_books: of one that was removed, too."""

    is_running: bool
    has_books: bool


def deploy(
    plan: Annotated[str | None, Parameter(help="Plan in YAML, or a model to plan for first")] = None,
    /,
    *,
    need: RequirementFlags | None = None,
    requests: MixFlags | None = None,
    offer: HardwareFlags | None = None,
    service: ServiceFlags | None = None,
    proving: VerifyFlags | None = None,
) -> int:
    """Carry out a plan on this machine: replicas behind a gateway, the promise verified, the service left running.

    With MODEL instead of a plan it is planned first, with the options of 'powerband plan'.
    Without either: make sure that every service has a controller.
    Exits with 1 when nothing keeps the SLO, or when --strict and the promise is broken.
    """
    service, proving = service or ServiceFlags(), proving or VerifyFlags()
    if plan is None:
        return _ensure_controllers()
    _check_options(proving)
    from powerband.cli.service.view import ServiceProgress

    chosen = _resolve_plan(plan, need, requests, offer, quiet=proving.json)
    if chosen is None:
        return NO_PLAN
    return _carry_out(chosen, service, proving, ServiceProgress(quiet=proving.json))


def _check_options(proving: VerifyFlags) -> None:
    """Before anything starts. Raises UsageError and EnvironmentFault."""
    if not 5 <= proving.verify_seconds <= 86_400:
        raise UsageError(f"verify-seconds is {proving.verify_seconds:g}.", hint="5 to 86400.", param="verify_seconds")
    if proving.report is not None and not proving.report.absolute().parent.is_dir():
        raise EnvironmentFault(f"Cannot write {proving.report}: there is no such folder.", param="report")


def _ensure_controllers() -> int:
    from powerband.fleet.control.controller_process import ensure_controller
    from powerband.fleet.service.store import services

    found = services()
    if not found:
        raise UsageError("What is to be deployed?", hint="Like: powerband deploy plan.yaml", param="plan")
    for folder in found:
        started = ensure_controller(folder)
        print(f"{folder.name}: {'a new controller was started' if started else 'its controller is alive'}")
    return 0


def _resolve_plan(
    text: str, need: RequirementFlags | None, requests: MixFlags | None, offer: HardwareFlags | None, *, quiet: bool
) -> Plan | None:
    """None: nothing keeps the SLO; that was told. Raises UsageError for flags that a plan decides."""
    from powerband.spec.plan import read_plan

    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        if any(flags is not None for flags in (need, requests, offer)):
            raise UsageError(f"{text} says what is needed and on offer.", hint="Leave these options out.", param="plan")
        return read_plan(path)
    from rich.console import Console

    from powerband.cli.plan.plan import plan_from, plan_request_from, search_with_progress
    from powerband.planner.report.table import plan_table

    plan_request = plan_request_from(text, need or RequirementFlags(), requests or MixFlags(), offer or HardwareFlags())
    results = search_with_progress(plan_request, None, quiet=quiet)
    if results.recommended is None:
        Console(stderr=True).print(plan_table(results))
        return None
    return plan_from(plan_request, results.recommended)


def _build_release(
    plan: Plan, flags: ServiceFlags, served_name: str, folder: ServiceStore, key_file: str
) -> BuiltRelease:
    import shlex

    from powerband.fleet.release import ReleaseOptions, build_release
    from powerband.fleet.targets.local import LocalTarget

    making = ReleaseOptions(
        served_name=served_name,
        api_key_file=key_file,
        executable=tuple(shlex.split(flags.engine_command)),
        extra=tuple(shlex.split(flags.engine_args)),
        threads=flags.threads,
        gpus_in_use=LocalTarget(folder.path).devices_in_use(),
    )
    return build_release(plan, making)


def _carry_out(plan: Plan, flags: ServiceFlags, proving: VerifyFlags, progress: ServiceProgress) -> int:
    from powerband.cli.service.gateway_flags import gateway_spec_from_flags, replica_key_file
    from powerband.fleet import operations
    from powerband.fleet.control.controller_process import ensure_controller
    from powerband.fleet.release import default_served_name
    from powerband.fleet.service.store import ServiceStore

    served_name = flags.served_model_name or default_served_name(plan.model)
    folder = ServiceStore.named(flags.name or operations.service_name(served_name))
    before = ExistingService(is_running=folder.exists(), has_books=folder.database.exists())
    front = gateway_spec_from_flags(flags.host, flags.port, flags.auth, flags.gateway_args, folder.read_spec())
    folder.create()
    made = _build_release(plan, flags, served_name, folder, replica_key_file(folder.path, front.auth))
    _print_plan(plan, made, folder, front, progress)
    desired, is_new = operations.apply(folder, made.release, front, _policy(flags))
    ensure_controller(folder)
    if not is_new:
        progress.say("nothing is to be changed")
    status = operations.wait_for(folder, desired.generation, progress, desired.policy.start_timeout_s + 60.0)
    if status.failed_rollout is not None and status.failed_rollout.generation == desired.generation:
        raise _failure(folder, status, before=before)
    if is_new:
        operations.record_action(
            folder, "deploy", {"revision": status.revision, "replicas": list(desired.release.counts)}
        )
    progress.say(f"{folder.name} is ready: {status.gateway.url}/v1")
    is_asked = is_new if proving.verify is None else proving.verify
    verified = _verified(plan, desired, status, folder, proving, progress) if is_asked else None
    kept = verified is None or verified.verdict != "broken"
    if not kept and proving.strict:
        _roll_back(folder, progress, before=before)
    _print_result(folder, status, verified, proving, is_new=is_new)
    return SLO_BROKEN if not kept and proving.strict else 0


def _warn_of_old_name(old: str, new: str) -> None:
    print(f"warning: {old} is now {new}; the old name will go with the next release.", file=sys.stderr)


def _policy(flags: ServiceFlags) -> Policy:
    from powerband.fleet.service.spec import Policy
    from powerband.spec.quantities import seconds

    if flags.surge is not None:
        _warn_of_old_name("--surge", "--max-surge")
    if flags.auto:
        _warn_of_old_name("--auto", "--auto-remediate")
    max_surge = flags.max_surge if flags.max_surge is not None else flags.surge
    if max_surge not in (None, 0, 1):
        raise UsageError(f"max_surge is {max_surge}.", hint="It is 0 or 1.", param="max_surge")
    if flags.webhook:
        from powerband.fleet.monitor.webhook import Webhook

        Webhook(flags.webhook).close()  # so that a wrong one is known now
    return Policy(
        max_surge=max_surge,
        drain_timeout_s=seconds(flags.drain_timeout, param="drain_timeout"),
        start_timeout_s=seconds(flags.start_timeout, param="start_timeout"),
        auto_remediate=flags.auto_remediate or flags.auto,
        webhook=flags.webhook,
    )


def _print_plan(
    plan: Plan, made: BuiltRelease, folder: ServiceStore, front: GatewaySpec, progress: ServiceProgress
) -> None:
    from powerband.planner.report.formatting import deployment_text

    if plan.deployment is not None:
        progress.say(f"plan: {made.release.served_name}, {deployment_text(plan.deployment)}")
    limits = f"{plan.slo} for {plan.slo.attainment * 100:g} % of requests at {plan.promise.rate:.3g} a second"
    progress.say(f"promise: {limits}")
    for note in made.notes:
        progress.say(note)
    progress.say(f"service {folder.name}: gateway on {front.host}:{front.port}, state in {folder.path}")


def _failure(folder: ServiceStore, status: ServiceStatus, *, before: ExistingService) -> EnvironmentFault:
    """What to tell of a release that did not start, once nothing is left of it."""
    from powerband.fleet import operations

    rejected = status.failed_rollout
    why = rejected.reason if rejected is not None else ""
    log = f"\n{rejected.log}" if rejected is not None and rejected.log else ""
    if before.is_running and operations.rollback(folder) is not None:
        return EnvironmentFault(f"The new release did not start: {why}.{log}", hint="What ran before goes on running.")
    operations.remove(folder, lambda _status: None, purge=not before.has_books)
    return EnvironmentFault(f"{folder.name} did not start: {why}.{log}", hint="Nothing was left running.")


def _verified(
    plan: Plan,
    desired: ServiceSpec,
    status: ServiceStatus,
    folder: ServiceStore,
    proving: VerifyFlags,
    progress: ServiceProgress,
) -> Verification:
    from powerband.bench.report.live import LiveView
    from powerband.fleet.verify import verify

    progress.say(f"verifying the promise: {plan.promise.rate:.3g} requests/s for {proving.verify_seconds:g} s")
    key = folder.admin_key.read_text().strip()
    with contextlib.nullcontext() if progress.quiet else LiveView(plan.slo, label=plan.workload.name) as view:
        return verify(
            plan,
            status.gateway.url,
            model=desired.release.served_name,
            api_key=key,
            seconds=proving.verify_seconds,
            report=proving.report,
            on_progress=view,
        )


def _roll_back(folder: ServiceStore, progress: ServiceProgress, *, before: ExistingService) -> None:
    from powerband.fleet import operations

    progress.say("the promise is broken: going back")
    desired = operations.rollback(folder) if before.is_running else None
    if desired is None:
        operations.remove(folder, progress, purge=not before.has_books)
        return
    operations.wait_for(folder, desired.generation, progress, desired.policy.start_timeout_s + 60.0)


def _print_result(
    folder: ServiceStore,
    status: ServiceStatus,
    verified: Verification | None,
    proving: VerifyFlags,
    *,
    is_new: bool,
) -> None:
    if proving.json:
        from powerband.cli.service.status import status_dict

        told: dict[str, object] = {"service": folder.name, "status": None}
        if folder.exists():
            told = status_dict(folder)
        told["changed"] = is_new
        told["verification"] = verified.as_dict() if verified is not None else None
        print(json_format.dumps(told, indent=1))
        return
    if verified is not None:
        from powerband.cli.service.view import print_verification

        print_verification(verified)
    if not folder.exists():
        print(f"{folder.name} was removed again.")
    else:
        print(f"{folder.name} serves {status.gateway.url}/v1")
        print("powerband status · powerband logs -f · powerband scale N · powerband remove", file=sys.stderr)
