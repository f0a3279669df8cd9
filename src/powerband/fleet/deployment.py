"""Deploys a plan: builds the release, starts it, verifies its SLO, and rolls back if a step fails."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from powerband.bench.load import Live
from powerband.errors import EnvironmentFault
from powerband.files import write_atomically
from powerband.fleet import operations
from powerband.fleet.control.controller_process import ensure_controller
from powerband.fleet.release import BuiltRelease, ReleaseOptions, build_release
from powerband.fleet.scaling import Report, keep_scaled
from powerband.fleet.service.spec import GatewaySpec, Policy, ServiceSpec
from powerband.fleet.service.status import ServiceStatus
from powerband.fleet.service.store import ServiceStore
from powerband.fleet.targets.local import devices_of_other_services
from powerband.fleet.verify import Verification, verify
from powerband.planner.report.formatting import deployment_text
from powerband.spec.plan import Plan

_GRACE_S = 60.0  # beyond the time that replicas have to become ready


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentOptions:
    store: ServiceStore
    gateway: GatewaySpec
    policy: Policy
    served_name: str  # in the API
    gateway_service: str = ""  # the service whose gateway serves the model; '': its own
    engine_command: tuple[str, ...] = ()
    engine_args: tuple[str, ...] = ()
    threads: int | None = None
    reset_replicas: bool = False  # to the plan's, also where 'powerband scale' set another number
    verify: bool | None = None  # None: if something has changed
    verify_seconds: float = 60.0
    report: Path | None = None  # of the verification, as HTML
    strict: bool = False  # roll back if the SLO is broken
    watch: Callable[[Plan], contextlib.AbstractContextManager[Callable[[Live], object] | None]] = field(
        default=lambda _plan: contextlib.nullcontext()
    )


@dataclass(frozen=True, slots=True)
class Deployed:
    store: ServiceStore
    status: ServiceStatus
    verification: Verification | None  # None: not asked for
    changed: bool

    @property
    def is_broken(self) -> bool:
        return self.verification is not None and self.verification.verdict == "broken"


@dataclass(frozen=True, slots=True)
class _Before:
    """What existed of a service before the deployment. has_database: True also for a removed service that has one."""

    is_running: bool
    has_database: bool


def deploy_plan(plan: Plan, options: DeploymentOptions, report: Report) -> Deployed:
    """Start the plan's service or change the one that runs, wait until it is ready, and verify its SLO.

    Raises EnvironmentFault if the release does not start; then what ran before runs again.
    """
    store, gateway = options.store, options.gateway
    before = _Before(is_running=store.exists(), has_database=store.database.exists())
    current = store.read_spec()
    # Before anything is written: a plan that cannot be deployed leaves no state.
    built = build_release(plan, _release_options(options))
    release, note = keep_scaled(
        built.release,
        current.release if current is not None and not current.removed else None,
        reset=options.reset_replicas,
    )
    _report_plan(plan, built, options, report)
    if note:
        report.describe(note)
    store.create()
    if gateway.auth == "keys":
        _make_replica_key(store)
    desired, is_new = operations.apply(store, release, gateway, options.policy, options.gateway_service)
    with operations.going_on(store, "goes on: it was being started" if is_new else "goes on"):
        status = _started(store, desired, before, report, is_new=is_new)
    if is_new:
        operations.record_action(store, "deploy", {"revision": status.revision, "replicas": list(release.counts)})
    report.describe(f"{store.name} is ready: {status.gateway.url}/v1")
    is_asked = is_new if options.verify is None else options.verify
    with operations.going_on(store, "goes on running; only its verification was ended"):
        verification = _verified(plan, desired, status, options, report) if is_asked else None
    deployed = Deployed(store, status, verification, is_new)
    if deployed.is_broken and options.strict:
        _roll_back(store, before, report)
    return deployed


def _started(
    store: ServiceStore, desired: ServiceSpec, before: _Before, report: Report, *, is_new: bool
) -> ServiceStatus:
    """Wait until the service is ready. Raises EnvironmentFault if it does not start, after it was cleaned up."""
    try:
        ensure_controller(store)
    except EnvironmentFault:
        if not before.is_running:
            store.delete(purge=not before.has_database)
        raise
    if not is_new:
        report.describe("nothing to change")
    status = operations.wait_for(store, desired.generation, report, desired.policy.start_timeout_s + _GRACE_S)
    if status.has_failed(desired.generation):
        raise _start_failure(store, status, before)
    return status


def _release_options(options: DeploymentOptions) -> ReleaseOptions:
    return ReleaseOptions(
        served_name=options.served_name,
        api_key_file=str(_replica_key_file(options.store)) if options.gateway.auth == "keys" else "",
        executable=options.engine_command,
        extra=options.engine_args,
        threads=options.threads,
        gpus_in_use=devices_of_other_services(options.store.path),
    )


def _replica_key_file(store: ServiceStore) -> Path:
    """The replicas' API key, which only the gateway has, so that no client on this machine can bypass the gateway."""
    return store.path / "replica.key"


def _make_replica_key(store: ServiceStore) -> None:
    path = _replica_key_file(store)
    if not path.exists():
        write_atomically(path, secrets.token_urlsafe(32).encode(), private=True)


def _report_plan(plan: Plan, built: BuiltRelease, options: DeploymentOptions, report: Report) -> None:
    store, gateway, owner = options.store, options.gateway, options.gateway_service
    if plan.deployment is not None:
        report.describe(f"plan: {built.release.served_name}, {deployment_text(plan.deployment)}")
    limits = f"{plan.slo} for {plan.slo.attainment * 100:g} % of requests at {plan.promise.rate:.3g} a second"
    report.describe(f"promise: {limits}")
    for note in built.notes:
        report.describe(note)
    whose = f"the gateway of {owner}" if owner else "gateway"
    report.describe(f"service {store.name}: {whose} on {gateway.host}:{gateway.port}, state in {store.path}")


def _start_failure(store: ServiceStore, status: ServiceStatus, before: _Before) -> EnvironmentFault:
    """The error for a release that did not start, after it was cleaned up."""
    failed = status.failed_rollout
    why = failed.reason if failed is not None else ""
    log = f"\n{failed.log}" if failed is not None and failed.log else ""
    if before.is_running and operations.rollback(store) is not None:
        return EnvironmentFault(f"The new release did not start: {why}.{log}", hint="What ran before goes on running.")
    operations.remove(store, lambda _status: None, purge=not before.has_database)
    return EnvironmentFault(f"{store.name} did not start: {why}.{log}", hint="Nothing was left running.")


def _verified(
    plan: Plan,
    desired: ServiceSpec,
    status: ServiceStatus,
    options: DeploymentOptions,
    report: Report,
) -> Verification:
    report.describe(f"verifying the promise: {plan.promise.rate:.3g} requests/s for {options.verify_seconds:g} s")
    with options.watch(plan) as watch:
        return verify(
            plan,
            status.gateway.url,
            model=desired.release.served_name,
            api_key=options.store.gateway_store.read_admin_key(),
            seconds=options.verify_seconds,
            report=options.report,
            on_progress=watch,
        )


def _roll_back(store: ServiceStore, before: _Before, report: Report) -> None:
    report.describe("the promise is broken: going back")
    desired = operations.rollback(store) if before.is_running else None
    if desired is None:
        operations.remove(store, report, purge=not before.has_database)
        return
    operations.wait_for(store, desired.generation, report, desired.policy.start_timeout_s + _GRACE_S)
