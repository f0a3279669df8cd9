"""The number of replicas: `powerband scale`, and what a new plan does to a number that was set by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from powerband.errors import EnvironmentFault, UsageError
from powerband.fleet import operations
from powerband.fleet.control.controller_process import ensure_controller
from powerband.fleet.control.instance_specs import excess_threads
from powerband.fleet.service.spec import Release, ServiceSpec
from powerband.fleet.service.status import ServiceStatus
from powerband.fleet.service.store import ServiceStore

MAX_REPLICAS = 1000


class Report(Protocol):
    """Receives the progress: lines of text, and the status as it changes."""

    def __call__(self, status: ServiceStatus) -> None: ...

    def describe(self, text: str) -> None: ...


def scale(store: ServiceStore, asked: Sequence[str], report: Callable[[], Report]) -> str:
    """Change the number of replicas, and wait until it is reached. Returns what is so now, as a sentence.

    asked: '3', or 'POOL=N' for some pools. report: makes one when there is something to wait for. Raises UsageError,
    and EnvironmentFault after the number has been changed back.
    """

    def change(current: ServiceSpec, _status: ServiceStatus | None) -> dict[str, Any]:
        return {"release": scaled(current.release, asked)}

    before = store.read_spec()
    if before is not None and scaled(before.release, asked) == before.release:
        return f"{store.name} already has {counts_text(before.release)}."
    progress = report()
    desired = operations.update_spec(store, change)
    with operations.going_on(store, "is still being scaled"):
        ensure_controller(store)
        operations.record_action(store, "scale", {"replicas": list(desired.release.counts)})
        beyond = excess_threads(desired.release)
        if beyond:
            progress.describe(f"this is more than this machine has: {beyond}")
        timeout_s = desired.policy.start_timeout_s + desired.policy.drain_timeout_s
        status = operations.wait_for(store, desired.generation, progress, timeout_s)
    if status.failed_rollout is not None and status.has_failed(desired.generation):
        operations.rollback(store)
        raise EnvironmentFault(
            f"{store.name} could not be scaled: {status.failed_rollout.reason}.\n{status.failed_rollout.log}".rstrip(),
            hint="It keeps its previous number of replicas.",
        )
    return f"{store.name} has {counts_text(desired.release)}."


def scaled(release: Release, asked: Sequence[str]) -> Release:
    """Raises UsageError for an invalid number or pool."""
    counts = list(release.counts)
    for text in asked:
        pool, sign, number = text.rpartition("=")
        if not sign and len(counts) > 1:
            raise UsageError(f"There are {len(counts)} pools.", hint="Name one: POOL=N, like 0=2.", param="replicas")
        index = int(pool) if pool.isdecimal() else 0 if not sign else -1
        if not 0 <= index < len(counts):
            known = ", ".join(map(str, range(len(counts))))
            raise UsageError(f"There is no pool {pool!r}.", hint=f"Pools: {known}.", param="replicas")
        if not number.isdecimal() or not 1 <= int(number) <= MAX_REPLICAS:
            raise UsageError(
                f"{text!r} is not a number of replicas.",
                hint=f"1 to {MAX_REPLICAS}; 'powerband remove' ends all.",
                param="replicas",
            )
        counts[index] = int(number)
    return release.with_counts(counts)


def keep_scaled(new: Release, current: Release | None, *, reset: bool) -> tuple[Release, str]:
    """A new release with the number of replicas that was set by `scale` (or by --auto-remediate), and a note about it.

    A plan with another number than the running plan has asks for another number: it counts. reset: the plan's counts
    in any case.
    """
    if current is None:
        return new, ""
    planned_before, planned = planned_counts(current), new.counts
    if current.counts in (planned_before, planned):
        return new, ""
    before = counts_text(current)
    if reset or planned_before != planned:
        why = "--reset-replicas" if reset else "another number than the plan before"
        return new, f"{counts_text(new)} as planned ({why}), instead of the {before} of 'powerband scale'"
    kept = new.with_counts(current.counts)
    return kept, f"keeping the {before} of 'powerband scale'; the plan has {sum(planned)} (--reset-replicas sets that)"


def planned_counts(release: Release) -> tuple[int, ...]:
    """Replicas of each pool as the release's plan has them."""
    pools = release.plan.get("deployment", {}).get("pools", ())
    return tuple(pool.get("count", 1) for pool in pools)


def counts_text(release: Release) -> str:
    """'3 replicas', '3 replicas (2 + 1)'."""
    total = sum(release.counts)
    pools = f" ({' + '.join(map(str, release.counts))})" if len(release.counts) > 1 else ""
    return f"{total} replica{'s' if total != 1 else ''}{pools}"
