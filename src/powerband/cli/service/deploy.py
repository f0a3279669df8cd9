"""`powerband deploy`: carry a plan out on this machine, and prove its promise."""

from __future__ import annotations

import contextlib
import json as json_format
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from powerband.cli.flags import Json
from powerband.cli.load_options import MixOptions
from powerband.cli.plan.plan import NO_PLAN, HardwareFlags, RequirementFlags
from powerband.errors import EnvironmentFault, UsageError
from powerband.renamed import warn_renamed

if TYPE_CHECKING:
    from collections.abc import Callable

    from powerband.bench.load import Live
    from powerband.fleet.deployment import Deployed, DeploymentOptions
    from powerband.fleet.service.spec import GatewaySpec, Policy
    from powerband.fleet.service.store import ServiceStore
    from powerband.spec.plan import Plan

SLO_BROKEN = 1
DEFAULT_VERIFY_S = 60.0
_SERVICE = Group("Service", sort_key=2)
_VERIFICATION = Group("Verification", sort_key=3)


def _flag(group: Group, *names: str, help: str) -> Parameter:
    # A value may begin with a hyphen: arguments for others do.
    return Parameter(
        name=names or None, help=help, group=group, negative="", show_default=False, allow_leading_hyphen=True
    )


def _old_flag() -> Parameter:
    """The name of an option in the version before: it still works, with a warning."""
    return Parameter(group=_SERVICE, negative="", show=False)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServiceFlags:
    name: Annotated[str | None, _flag(_SERVICE, help="Name of the service; default: the model's")] = None
    served_model_name: Annotated[str, _flag(_SERVICE, help="Name in the API; default: MODEL as given")] = ""
    gateway: Annotated[
        str | None, _flag(_SERVICE, help="Add the model to the gateway of this service instead of starting one")
    ] = None
    host: Annotated[str | None, _flag(_SERVICE, help="Address of the gateway; default: 127.0.0.1")] = None
    port: Annotated[int | None, _flag(_SERVICE, help="Port of the gateway; default: 8000, or a free one")] = None
    auth: Annotated[
        Literal["open", "keys"] | None,
        _flag(_SERVICE, help="open: requests need no API key (default on loopback); keys: every request needs one"),
    ] = None
    reset_replicas: Annotated[
        bool, _flag(_SERVICE, help="Use the plan's number of replicas, also after 'powerband scale'")
    ] = False
    threads: Annotated[int | None, _flag(_SERVICE, help="CPU threads of a replica; default: a fair part")] = None
    max_surge: Annotated[
        int | None, _flag(_SERVICE, help="Extra replicas during a rollout: 0 or 1; default: 1 if memory allows")
    ] = None
    surge: Annotated[int | None, _old_flag()] = None
    drain_timeout: Annotated[str, _flag(_SERVICE, help="Time for running requests to finish; default: 120s")] = "120s"
    start_timeout: Annotated[str, _flag(_SERVICE, help="Time for a replica to become ready; default: 30min")] = "30min"
    auto_remediate: Annotated[bool, _flag(_SERVICE, help="Carry out the actions that the monitor suggests")] = False
    auto: Annotated[bool, _old_flag()] = False
    webhook: Annotated[str, _flag(_SERVICE, help="URL for notifications of incidents")] = ""
    gateway_args: Annotated[
        str, _flag(_SERVICE, help="Options of 'powerband gateway', e.g. '--default-deadline-s 2'")
    ] = ""
    engine_command: Annotated[
        str, _flag(_SERVICE, help="Command that starts the engine, e.g. '/opt/vllm/bin/vllm'; default: detected")
    ] = ""
    engine_args: Annotated[str, _flag(_SERVICE, help="More arguments for the engine")] = ""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class VerifyFlags:
    verify: Annotated[
        bool | None,
        Parameter(
            help="Send the plan's load and compare with the promise; default: if something has changed",
            group=_VERIFICATION,
            show_default=False,
        ),
    ] = None
    verify_seconds: Annotated[float, _flag(_VERIFICATION, help="Duration of the load; default: 60")] = DEFAULT_VERIFY_S
    strict: Annotated[bool, _flag(_VERIFICATION, help="Roll back and exit with 1 if the promise is broken")] = False
    report: Annotated[Path | None, _flag(_VERIFICATION, help="Write the report of the load to this HTML file")] = None
    json: Annotated[Json, Parameter(group=_VERIFICATION)] = False


def deploy(
    plan: Annotated[str | None, Parameter(help="Plan in YAML, or a model to plan for first")] = None,
    /,
    *,
    need: RequirementFlags | None = None,
    requests: MixOptions | None = None,
    offer: HardwareFlags | None = None,
    service: ServiceFlags | None = None,
    proving: VerifyFlags | None = None,
) -> int:
    """Deploy a plan on this machine: replicas behind a gateway. Verifies the promise; the service keeps running.

    With a MODEL instead of a plan, make the plan first, with the options of 'powerband plan'.
    Without either, make sure that every service has a controller.
    Exits with 1 if no deployment meets the SLO, or if --strict is given and the promise is broken.
    """
    service, proving = service or ServiceFlags(), proving or VerifyFlags()
    if plan is None:
        return _ensure_controllers()
    from powerband.cli.service.progress import ServiceProgress
    from powerband.fleet.deployment import deploy_plan

    chosen = _read_plan(plan, need, requests, offer)
    # Before the search for a plan, which may take minutes.
    options = _options(chosen.model if chosen is not None else plan, service, proving)
    chosen = chosen or _find_plan(plan, need, requests, offer, quiet=proving.json)
    if chosen is None:
        return NO_PLAN
    deployed = deploy_plan(chosen, options, ServiceProgress(quiet=proving.json))
    _print_result(deployed, as_json=proving.json)
    return SLO_BROKEN if deployed.is_broken and proving.strict else 0


def _check_options(proving: VerifyFlags) -> None:
    """Before anything starts. Raises UsageError and EnvironmentFault."""
    if not 5 <= proving.verify_seconds <= 86_400:
        raise UsageError(
            f"verify_seconds is {proving.verify_seconds:g}; it must be between 5 and 86400.", param="verify_seconds"
        )
    if proving.report is not None and not proving.report.absolute().parent.is_dir():
        raise EnvironmentFault(f"Cannot write {proving.report}: there is no such folder.", param="report")


def _ensure_controllers() -> int:
    from powerband.fleet.control.controller_process import ensure_controller
    from powerband.fleet.service.store import services

    found = services()
    if not found:
        raise UsageError(
            "No plan is given, and there is no service yet.",
            hint="For example: powerband deploy plan.yaml",
            param="plan",
        )
    for folder in found:
        started = ensure_controller(folder)
        print(f"{folder.name}: {'started a new controller' if started else 'its controller is running'}")
    return 0


def _read_plan(
    text: str, need: RequirementFlags | None, requests: MixOptions | None, offer: HardwareFlags | None
) -> Plan | None:
    """None: a model is given, not a plan. Raises UsageError for options that a plan decides."""
    from powerband.spec.plan import read_plan

    path = Path(text)
    if path.suffix not in (".yaml", ".yml"):
        if path.is_file() and path.suffix != ".json":
            raise UsageError(
                f"{text} is a file, and no plan: a plan ends with .yaml.",
                hint="'powerband plan MODEL -o plan.yaml' writes one. A model is a folder, an id or 'demo'.",
                param="plan",
            )
        return None
    if any(flags is not None for flags in (need, requests, offer)):
        raise UsageError(
            f"{text} already contains the requirements and the hardware.",
            hint="Leave out the options of 'powerband plan'.",
            param="plan",
        )
    return read_plan(path)


def _find_plan(
    model: str, need: RequirementFlags | None, requests: MixOptions | None, offer: HardwareFlags | None, *, quiet: bool
) -> Plan | None:
    """None: no deployment meets the SLO, which was printed."""
    from rich.console import Console

    from powerband.cli.plan.plan import plan_request_from, search_with_progress
    from powerband.planner.report.table import plan_table
    from powerband.planner.selection import plan_from

    plan_request = plan_request_from(
        model, need or RequirementFlags(), requests or MixOptions(), offer or HardwareFlags()
    )
    results = search_with_progress(plan_request, None, quiet=quiet)
    if results.recommended is None:
        Console(stderr=True).print(plan_table(results))
        return None
    if results.cut and not quiet:
        print(f"· {results.cut}", file=sys.stderr)
    return plan_from(plan_request, results.recommended)


def _options(model: str, flags: ServiceFlags, proving: VerifyFlags) -> DeploymentOptions:
    """Raises UsageError and EnvironmentFault for what cannot be asked."""
    import shlex

    from powerband.bench.report.live import LiveView
    from powerband.fleet.deployment import DeploymentOptions
    from powerband.fleet.operations import service_name
    from powerband.fleet.release import default_served_name
    from powerband.fleet.service.store import ServiceStore

    _check_options(proving)
    if flags.threads is not None and flags.threads < 1:
        raise UsageError(f"threads is {flags.threads}; it must be at least 1.", param="threads")
    served_name = flags.served_model_name or default_served_name(model)
    store = ServiceStore.named(flags.name or service_name(served_name))
    store.check_can_be_kept()

    def watch(plan: Plan) -> contextlib.AbstractContextManager[Callable[[Live], object] | None]:
        return contextlib.nullcontext() if proving.json else LiveView(plan.slo, label=plan.workload.name)

    gateway, gateway_service = _gateway(flags, served_name, store)
    return DeploymentOptions(
        store=store,
        gateway=gateway,
        gateway_service=gateway_service,
        policy=_policy(flags),
        served_name=served_name,
        engine_command=tuple(shlex.split(flags.engine_command)),
        engine_args=tuple(shlex.split(flags.engine_args)),
        threads=flags.threads,
        reset_replicas=flags.reset_replicas,
        verify=proving.verify,
        verify_seconds=proving.verify_seconds,
        report=proving.report,
        strict=proving.strict,
        watch=watch,
    )


def _gateway(flags: ServiceFlags, served_name: str, store: ServiceStore) -> tuple[GatewaySpec, str]:
    """The gateway, and the service that it belongs to if that is another one. Raises UsageError."""
    from powerband.cli.service.gateway_flags import gateway_arguments
    from powerband.fleet.service.gateway_choice import own_gateway, shared_gateway

    current = store.read_spec()
    joined = flags.gateway
    if joined is None and current is not None and not current.removed:
        joined = current.gateway_service or None
    if joined is None:
        host = flags.host or "127.0.0.1"
        return own_gateway(host, flags.port, flags.auth, gateway_arguments(flags.gateway_args), current), ""
    for name in ("host", "port", "auth", "gateway_args"):
        if getattr(flags, name):
            raise UsageError(
                f"--{name.replace('_', '-')} is for a gateway of its own; {store.name} uses that of {joined}.",
                hint=f"Deploy {joined} with it.",
                param=name,
            )
    return shared_gateway(joined, served_name, store), joined


def _policy(flags: ServiceFlags) -> Policy:
    from powerband.fleet.service.spec import Policy
    from powerband.spec.quantities import seconds

    if flags.surge is not None:
        warn_renamed("--surge", "--max-surge")
    if flags.auto:
        warn_renamed("--auto", "--auto-remediate")
    max_surge = flags.max_surge if flags.max_surge is not None else flags.surge
    if max_surge not in (None, 0, 1):
        raise UsageError(f"max_surge is {max_surge}; it must be 0 or 1.", param="max_surge")
    if flags.webhook:
        from powerband.fleet.monitor.webhook import Webhook

        Webhook(flags.webhook).close()  # raises an error now for an invalid URL
    return Policy(
        max_surge=max_surge,
        drain_timeout_s=seconds(flags.drain_timeout, param="drain_timeout"),
        start_timeout_s=seconds(flags.start_timeout, param="start_timeout"),
        auto_remediate=flags.auto_remediate or flags.auto,
        webhook=flags.webhook,
    )


def _print_result(deployed: Deployed, *, as_json: bool) -> None:
    store, verified = deployed.store, deployed.verification
    if as_json:
        from powerband.fleet.report.status_table import status_as_dict

        shown: dict[str, object] = {"service": store.name, "status": None}
        if store.exists():
            shown = status_as_dict(store)
        shown |= {"changed": deployed.changed, "verification": verified.as_dict() if verified is not None else None}
        print(json_format.dumps(shown, indent=1))
        return
    if verified is not None:
        from powerband.fleet.report.verification_table import verification_lines

        print("\n".join(verification_lines(verified)))
    if not store.exists():
        print(f"{store.name} was removed again.")
    else:
        print(f"{store.name} serves {deployed.status.gateway.url}/v1")
        name = store.name
        print(
            f"It goes on running: powerband status {name} · powerband events {name} · powerband logs {name} -f"
            f" · powerband scale {name} N · powerband remove {name}",
            file=sys.stderr,
        )
