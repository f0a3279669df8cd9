"""Events for changes of the desired state."""

from __future__ import annotations

from powerband.fleet.control.instance_specs import pool_revisions, release_revision
from powerband.fleet.monitor.events import Events
from powerband.fleet.service.spec import ServiceSpec


def record_change(events: Events, before: ServiceSpec | None, spec: ServiceSpec) -> None:
    """before: None: not known, as this is the controller's first look."""
    counts = " + ".join(map(str, spec.release.counts))
    if spec.removed:
        events.record("Removed", spec.name, "all processes are being stopped")
    elif before is not None and before.drained != spec.drained:
        for id in sorted(set(spec.drained) - set(before.drained)):
            events.record("Cordoned", id, "gets no new requests, as asked")
        for id in sorted(set(before.drained) - set(spec.drained)):
            events.record("Uncordoned", id, "gets requests again, as asked")
    elif before is not None and pool_revisions(before.release) == pool_revisions(spec.release):
        was = " + ".join(map(str, before.release.counts))
        if was != counts:
            events.record("Scaled", spec.name, f"replicas: from {was} to {counts}")
    else:
        revision = release_revision(spec.release)
        events.record("Deployed", spec.name, f"generation {spec.generation}, revision {revision}, replicas: {counts}")
