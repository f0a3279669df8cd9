"""`powerband deploy`: carry a plan out on this machine, and prove its promise."""

from __future__ import annotations

import contextlib
import json as json_format
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from powerband.cli.bench_options import MixFlags
from powerband.cli.flags import Json
from powerband.cli.plan import NOTHING_MEETS_IT, NeedFlags, OfferFlags
from powerband.errors import EnvironmentFault, UsageError
from powerband.fleet.state import Desired, Front, Policy, ServiceFolder, Status, services

if TYPE_CHECKING:
    from powerband.cli.fleet_view import Progress
    from powerband.fleet.releasing import Made
    from powerband.fleet.verify import Verification
    from powerband.spec.plan import Plan

BROKEN = 1
DEFAULT_PORT = 8000
DEFAULT_VERIFY_S = 60.0
_SERVICE = Group("Service", sort_key=2)
_PROVING = Group("Proving", sort_key=3)


def _flag(group: Group, *names: str, help: str) -> Parameter:
    return Parameter(name=names or None, help=help, group=group, negative="", show_default=False)


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
    surge: Annotated[
        int | None, _flag(_SERVICE, help="Replicas more while one is replaced: 0 or 1; default: 1 if there is memory")
    ] = None
    drain_timeout: Annotated[str, _flag(_SERVICE, help="For running requests to end; default: 120s")] = "120s"
    start_timeout: Annotated[str, _flag(_SERVICE, help="For a replica to become ready; default: 30min")] = "30min"
    auto: Annotated[bool, _flag(_SERVICE, help="Carry out what the watcher suggests")] = False
    engine_command: Annotated[
        str, _flag(_SERVICE, help="How the engine is started, e.g. '/opt/vllm/bin/vllm'; default: found")
    ] = ""
    engine_args: Annotated[str, _flag(_SERVICE, help="Arguments for the engine, after the plan's")] = ""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ProvingFlags:
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


def deploy(
    plan: Annotated[str | None, Parameter(help="Plan in YAML, or a model to plan for first")] = None,
    /,
    *,
    need: NeedFlags | None = None,
    requests: MixFlags | None = None,
    offer: OfferFlags | None = None,
    service: ServiceFlags | None = None,
    proving: ProvingFlags | None = None,
) -> int:
    """Carry out a plan on this machine: replicas behind a gateway, the promise verified, the service left running.

    With MODEL instead of a plan it is planned first, with the options of 'powerband plan'.
    Without either: make sure that every service has a controller.
    Exits with 1 when nothing keeps the SLO, or when --strict and the promise is broken.
    """
    service, proving = service or ServiceFlags(), proving or ProvingFlags()
    if plan is None:
        return _look_after_all()
    from powerband.cli.fleet_view import Progress

    chosen = _chosen_plan(plan, need, requests, offer, quiet=proving.json)
    if chosen is None:
        return NOTHING_MEETS_IT
    made = _made(chosen, service)
    return _carry_out(chosen, made, service, proving, Progress(quiet=proving.json))


def _look_after_all() -> int:
    from powerband.fleet.controller_process import ensure_controller

    found = services()
    if not found:
        raise UsageError("What is to be deployed?", hint="Like: powerband deploy plan.yaml", param="plan")
    for folder in found:
        started = ensure_controller(folder)
        print(f"{folder.name}: {'a new controller was started' if started else 'its controller is alive'}")
    return 0


def _chosen_plan(
    text: str, need: NeedFlags | None, requests: MixFlags | None, offer: OfferFlags | None, *, quiet: bool
) -> Plan | None:
    """None: nothing keeps the SLO; that was told. Raises UsageError for flags that a plan decides."""
    from powerband.spec.plan import read_plan

    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        if any(flags is not None for flags in (need, requests, offer)):
            raise UsageError(f"{text} says what is needed and on offer.", hint="Leave these options out.", param="plan")
        return read_plan(path)
    from rich.console import Console

    from powerband.cli.plan import plan_of, question_of, searched
    from powerband.planner.table import plan_table

    question = question_of(text, need or NeedFlags(), requests or MixFlags(), offer or OfferFlags())
    findings = searched(question, None, quiet=quiet)
    if findings.recommended is None:
        Console(stderr=True).print(plan_table(findings))
        return None
    return plan_of(question, findings.recommended)


def _made(plan: Plan, flags: ServiceFlags) -> Made:
    import shlex

    from powerband.fleet.releasing import Making, make_release

    taken = {gpu for folder in services() if (found := folder.desired()) is not None for gpu in found.release.gpus}
    making = Making(
        served_name=flags.served_model_name,
        executable=tuple(shlex.split(flags.engine_command)),
        extra=tuple(shlex.split(flags.engine_args)),
        threads=flags.threads,
        taken_gpus=frozenset(taken),
    )
    return make_release(plan, making)


def _carry_out(plan: Plan, made: Made, flags: ServiceFlags, proving: ProvingFlags, progress: Progress) -> int:
    from powerband.fleet import changing
    from powerband.fleet.audit import note_action
    from powerband.fleet.controller_process import ensure_controller

    folder = ServiceFolder.of(flags.name or changing.name_of(made.release.served_name))
    was_there = folder.exists()
    front = _front(flags, folder.desired())
    _say_plan(plan, made, folder, front, progress)
    desired, is_new = changing.apply(folder, made.release, front, _policy(flags))
    ensure_controller(folder)
    if not is_new:
        progress.say("nothing has changed")
    status = changing.wait_for(folder, desired.generation, progress, desired.policy.ready_s + 60.0)
    if status.rejected is not None and status.rejected.generation == desired.generation:
        raise _failure(folder, status, was_there=was_there)
    if is_new:
        note_action(folder, "deploy", {"revision": status.revision, "replicas": list(desired.release.counts)})
    progress.say(f"{folder.name} is ready: {status.gateway.url}/v1")
    is_asked = is_new if proving.verify is None else proving.verify
    verified = _verified(plan, desired, status, folder, proving, progress) if is_asked else None
    kept = verified is None or verified.verdict != "broken"
    if not kept and proving.strict:
        _go_back(folder, progress, was_there=was_there)
    _tell(folder, status, verified, proving, is_new=is_new)
    return BROKEN if not kept and proving.strict else 0


def _front(flags: ServiceFlags, current: Desired | None) -> Front:
    """Where the gateway listens: as asked, as before, or where there is room. Raises UsageError, EnvironmentFault."""
    from powerband.web.access import is_loopback

    is_open = is_loopback(flags.host)
    auth = flags.auth or ("open" if is_open else "keys")
    if auth == "open" and not is_open:
        raise UsageError(
            f"On {flags.host} without keys anyone could come in.", hint="Leave --auth open out.", param="auth"
        )
    if current is not None and not current.removed and flags.port in (None, current.front.port):
        return Front(host=flags.host, port=current.front.port, auth=auth)
    if flags.port is not None:
        if not _is_free(flags.host, flags.port):
            raise EnvironmentFault(
                f"Port {flags.port} on {flags.host} is taken.", hint="Choose another with --port.", param="port"
            )
        return Front(host=flags.host, port=flags.port, auth=auth)
    port = DEFAULT_PORT if _is_free(flags.host, DEFAULT_PORT) else _free_port(flags.host)
    return Front(host=flags.host, port=port, auth=auth)


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def _policy(flags: ServiceFlags) -> Policy:
    from powerband.spec.quantities import seconds

    if flags.surge not in (None, 0, 1):
        raise UsageError(f"surge is {flags.surge}.", hint="It is 0 or 1.", param="surge")
    return Policy(
        surge=flags.surge,
        drain_s=seconds(flags.drain_timeout, param="drain_timeout"),
        ready_s=seconds(flags.start_timeout, param="start_timeout"),
        auto=flags.auto,
    )


def _say_plan(plan: Plan, made: Made, folder: ServiceFolder, front: Front, progress: Progress) -> None:
    from powerband.planner.words import deployment_text

    if plan.deployment is not None:
        progress.say(f"plan: {made.release.served_name}, {deployment_text(plan.deployment)}")
    limits = f"{plan.slo} for {plan.slo.attainment * 100:g} % of requests at {plan.promise.rate:.3g} a second"
    progress.say(f"promise: {limits}")
    for note in made.notes:
        progress.say(note)
    progress.say(f"service {folder.name}: gateway on {front.host}:{front.port}, state in {folder.path}")


def _failure(folder: ServiceFolder, status: Status, *, was_there: bool) -> EnvironmentFault:
    """What to tell of a release that did not start, once nothing is left of it."""
    from powerband.fleet import changing

    rejected = status.rejected
    why = rejected.why if rejected is not None else ""
    log = f"\n{rejected.log}" if rejected is not None and rejected.log else ""
    if was_there and changing.go_back(folder) is not None:
        return EnvironmentFault(f"The new release did not start: {why}.{log}", hint="What ran before goes on running.")
    changing.remove(folder, lambda _status: None, purge=not was_there)
    return EnvironmentFault(f"{folder.name} did not start: {why}.{log}", hint="Nothing was left running.")


def _verified(
    plan: Plan,
    desired: Desired,
    status: Status,
    folder: ServiceFolder,
    proving: ProvingFlags,
    progress: Progress,
) -> Verification:
    from powerband.bench.live import LiveView
    from powerband.fleet.verify import verify

    if not 5 <= proving.verify_seconds <= 86_400:
        raise UsageError(f"verify-seconds is {proving.verify_seconds:g}.", hint="5 to 86400.", param="verify_seconds")
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
            watch=view,
        )


def _go_back(folder: ServiceFolder, progress: Progress, *, was_there: bool) -> None:
    from powerband.fleet import changing

    progress.say("the promise is broken: going back")
    before = changing.go_back(folder) if was_there else None
    if before is None:
        changing.remove(folder, progress, purge=not was_there)
        return
    changing.wait_for(folder, before.generation, progress, before.policy.ready_s + 60.0)


def _tell(
    folder: ServiceFolder,
    status: Status,
    verified: Verification | None,
    proving: ProvingFlags,
    *,
    is_new: bool,
) -> None:
    if proving.json:
        from powerband.cli.status import status_dict

        told: dict[str, object] = {"service": folder.name, "status": None}
        if folder.exists():
            told = status_dict(folder)
        told["changed"] = is_new
        told["verification"] = verified.as_dict() if verified is not None else None
        print(json_format.dumps(told, indent=1))
        return
    if verified is not None:
        from powerband.cli.fleet_view import print_verification

        print_verification(verified)
    if folder.exists():
        print(f"{folder.name} serves {status.gateway.url}/v1")
        print("powerband status · powerband logs -f · powerband scale N · powerband remove", file=sys.stderr)
