"""What the fleet's commands print: progress on stderr as things change, and a service's state as a table."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from powerband.cli.tables import print_table
from powerband.fleet.service.spec import ServiceSpec
from powerband.fleet.service.status import ReplicaStatus, ServiceStatus
from powerband.fleet.service.store import ServiceStore
from powerband.metrics.shown import share_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from powerband.fleet.verify import Verification

_VERDICTS = {
    "kept": "The promise is kept",
    "broken": "The promise is broken",
    "unclear": "Missed, but by so few requests that it may be chance",
    "invalid": "The run says nothing about the service",
}


@dataclass(slots=True)
class ServiceProgress:
    """One line on stderr for each thing that changes, with the seconds since the start."""

    quiet: bool = False
    began_s: float = field(default_factory=time.monotonic)
    _last: dict[str, str] = field(default_factory=dict)

    def __call__(self, status: ServiceStatus) -> None:
        current: dict[str, str] = {"gateway": status.gateway.state}
        current |= {one.id: _activity(one) for one in status.replicas}
        for id in self._last.keys() - current.keys():
            self.describe(f"{id}: gone")
        for id, text in current.items():
            if self._last.get(id) != text:
                self.describe(f"{id}: {text}")
        self._last = current

    def describe(self, text: str) -> None:
        if not self.quiet:
            print(f"· {time.monotonic() - self.began_s:5.1f} s  {text}", file=sys.stderr, flush=True)


def _activity(replica: ReplicaStatus) -> str:
    if replica.state == "starting" and replica.note:
        phase = replica.note.removeprefix("The engine is starting (").removesuffix(").")
        return f"starting ({phase})" if phase != replica.note else "starting"
    return replica.state


def print_status(folder: ServiceStore, desired: ServiceSpec, status: ServiceStatus | None) -> None:
    """On stdout."""
    promise = desired.release.plan["promise"]
    rows = [["service", desired.name], ["model", desired.release.served_name]]
    if status is None:
        print_table([*rows, ["state", "nothing is known yet"]])
        return
    rows.append(["state", _state_text(folder, status)])
    rows.append(["revision", f"{status.revision or 'none'} (generation {status.generation})"])
    rows.append(["gateway", f"{status.gateway.url}/v1  {status.gateway.state}, pid {status.gateway.pid or 'none'}"])
    rows.append(["promise", promise_text(desired)])
    load = status.load
    rate = f"{load.requests_per_s:.2f} requests/s of {promise['rate']:.3g}"
    rows.append(["load", f"{rate}, {load.running} running, {load.queued} queued"])
    rows.append(["attainment", _attainment_text(desired, status)])
    rows += [["note", note] for note in status.notes]
    if status.failed_rollout is not None:
        rows.append(["rejected", f"generation {status.failed_rollout.generation}: {status.failed_rollout.reason}"])
    rows += [["incident", text] for text in status.incidents]
    print_table(rows)
    print()
    print_table([_HEADINGS, *(_replica_row(one) for one in status.replicas)])


_HEADINGS = ["replica", "state", "pool", "revision", "pid", "port", "running", "waiting", "KV", "up", "restarts"]


def _replica_row(one: ReplicaStatus) -> Sequence[str]:
    return [
        one.id,
        _activity(one),
        str(one.pool),
        one.revision,
        str(one.pid),
        one.url.rpartition(":")[2],
        str(one.running),
        str(one.waiting),
        "–" if one.kv_usage is None else f"{one.kv_usage:.0%}",
        duration_text(time.time() - one.started_at),
        str(one.restarts),
    ]


def promise_text(desired: ServiceSpec) -> str:
    from powerband.spec.slo import SLO

    slo, promise = SLO.from_dict(desired.release.plan["slo"]), desired.release.plan["promise"]
    return f"{slo} for {slo.attainment * 100:g} % of requests at {promise['rate']:.3g} a second"


def _state_text(folder: ServiceStore, status: ServiceStatus) -> str:
    state = folder.controller_state()
    if state == "alive":
        return status.phase
    what = "its controller hangs" if state == "hung" else "no controller is alive"
    age = duration_text(time.time() - status.at)
    return f"{status.phase} {age} ago; {what} ('powerband deploy' starts another)"


def _attainment_text(desired: ServiceSpec, status: ServiceStatus) -> str:
    load = status.load
    if load.attainment is None:
        return "no requests yet"
    asked = desired.release.plan["slo"].get("attainment", 0.95)
    since = _ago(load.since)
    return f"{share_text(load.attainment)} of {load.scheduled:,} requests since {since}, {asked * 100:g} % are promised"


def _ago(at: float) -> str:
    return f"{duration_text(time.time() - at)} ago"


def duration_text(seconds: float) -> str:
    """'42 s', '7 min', '3.5 h', '12 days'."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def print_verification(verified: Verification) -> None:
    """Promised beside measured, on stdout."""
    # A run that says nothing keeps and breaks nothing either.
    is_valid = verified.verdict != "invalid"
    rows = [
        [line.name, line.promised, line.predicted, line.measured, line.verdict if is_valid else ""]
        for line in verified.lines
    ]
    print_table([["", "promised", "predicted", "measured", ""], *rows])
    errors = f", {verified.errors} failed" if verified.errors else ""
    print(f"\n{_VERDICTS[verified.verdict]}: {verified.requests} requests in {verified.seconds:.0f} s{errors}.")
    if verified.fault:
        print(f"Why: {verified.fault}.")
    missed = [f"{line.name} {line.outside}" for line in verified.lines if line.outside]
    if missed and is_valid:
        print(
            print(f"Measured outside the predicted band: {', '.join(missed)} ('powerband calibrate' measures again).")
        )
    if verified.verdict == "unclear":
        print("More requests tell more: --verify-seconds.")
    if verified.report:
        print(f"report: {verified.report}")
