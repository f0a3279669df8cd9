"""`powerband scale`: change the number of replicas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from powerband.cli.service.remove import Name
from powerband.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from powerband.fleet.service.spec import Release, ServiceSpec
    from powerband.fleet.service.status import ServiceStatus

MAX_REPLICAS = 1000


def scale(
    replicas: Annotated[
        tuple[str, ...], Parameter(help="Number of replicas; with several pools POOL=N, e.g. 0=2 1=1", negative="")
    ],
    /,
    *,
    name: Name = None,
) -> int:
    """Change the number of replicas. New ones get requests once they are ready; removed ones finish theirs first."""
    from powerband.cli.service.view import ServiceProgress
    from powerband.fleet import operations
    from powerband.fleet.control.controller_process import ensure_controller
    from powerband.fleet.control.instance_specs import excess_threads
    from powerband.fleet.service.store import find_service

    folder = find_service(name)

    def change(current: ServiceSpec, _status: ServiceStatus | None) -> dict[str, Any]:
        return {"release": scaled(current.release, replicas)}

    before = folder.read_spec()
    if before is not None and scaled(before.release, replicas) == before.release:
        print(f"{folder.name} already has {_counts_text(before.release)}.")
        return 0
    progress = ServiceProgress()
    desired = operations.update_spec(folder, change)
    ensure_controller(folder)
    operations.record_action(folder, "scale", {"replicas": list(desired.release.counts)})
    beyond = excess_threads(desired.release)
    if beyond:
        progress.describe(f"this is more than this machine has: {beyond}")
    status = operations.wait_for(
        folder, desired.generation, progress, desired.policy.start_timeout_s + desired.policy.drain_timeout_s
    )
    if status.failed_rollout is not None and status.failed_rollout.generation == desired.generation:
        operations.rollback(folder)
        raise EnvironmentFault(
            f"{folder.name} could not be scaled: {status.failed_rollout.reason}.\n{status.failed_rollout.log}".rstrip(),
            hint="It keeps its previous number of replicas.",
        )
    print(f"{folder.name} has {_counts_text(desired.release)}.")
    return 0


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


def _counts_text(release: Release) -> str:
    total = sum(release.counts)
    pools = f" ({' + '.join(map(str, release.counts))})" if len(release.counts) > 1 else ""
    return f"{total} replica{'s' if total != 1 else ''}{pools}"
