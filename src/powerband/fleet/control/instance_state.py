"""The controller's state of an instance (a replica or the gateway): what was observed, and what was decided.

InstanceSpec (fleet.targets.base) says what to start, InstanceState what the controller knows of it, and ReplicaStatus
(fleet.service.status) what `powerband status` shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from powerband.fleet.control.probes import ProbeResult
from powerband.fleet.service.spec import Policy
from powerband.fleet.targets.base import Instance

MAX_MISSED_PROBES = 3  # consecutive, before an instance may count as hung
GATEWAY_START_TIMEOUT_S = 30.0  # it loads no weights
_HEALTHY_FOR_S = 2.0  # after the last probe that found it ready


@dataclass(slots=True, kw_only=True)
class InstanceState:
    """Times on the controller's clock; `observe` updates the observed part once a tick."""

    instance: Instance
    first_seen_s: float = 0.0  # by this controller
    restarts: int = 0  # its own crashes and those of its predecessors

    # observed
    probe: ProbeResult = field(default_factory=ProbeResult)
    ready_s: float | None = None  # when it became ready
    is_healthy: bool = False  # it is ready, by a recent probe
    hang_reason: str = ""  # why it must be killed; '': it need not
    is_cordoned: bool = False  # a user drained it
    is_idle: bool = False  # it has no requests left
    engine_restarts: int | None = None  # of the engine within it; None: it has not been ready for this controller

    # decided
    draining_s: float | None = None  # when its drain began
    is_killed: bool = False  # because it hangs
    exit_expected: bool = False  # it was asked to stop: its exit is not a crash
    pending_replacement: bool = False  # drain it once another replica can take over
    is_replaced: bool = False  # the next replica that starts is its replacement

    @property
    def id(self) -> str:
        return self.instance.id

    @property
    def number(self) -> int:
        """A replica's sequence number: larger for replicas started later."""
        return int(self.instance.id.rpartition("r")[2])

    @property
    def pool(self) -> int:
        return self.instance.pool

    @property
    def revision(self) -> str:
        return self.instance.revision

    @property
    def phase(self) -> Literal["starting", "ready", "stopping"]:
        """'ready' means that it became ready once, even if it is unhealthy now."""
        if self.instance.stopping:
            return "stopping"
        return "starting" if self.ready_s is None else "ready"

    @property
    def is_hung(self) -> bool:
        return self.hang_reason != ""

    @property
    def is_serving(self) -> bool:
        return self.phase == "ready" and self.is_healthy and not self.is_cordoned and not self.is_hung

    @property
    def is_draining(self) -> bool:
        return self.draining_s is not None

    def is_drained(self, timeout_s: float, now_s: float) -> bool:
        """Whether it has finished its requests, or the drain has timed out."""
        return self.draining_s is not None and (self.is_idle or now_s - self.draining_s > timeout_s)

    def observe(self, instance: Instance, probe: ProbeResult, policy: Policy, now_s: float) -> bool:
        """Update the observed part. Returns True if it has become ready since the last observation."""
        self.instance, self.probe = instance, probe
        became_ready = probe.ready_s is not None and self.ready_s is None and not instance.stopping
        if became_ready:
            self.ready_s = now_s
        since_ready_s = now_s - max(probe.ready_s or 0.0, self.first_seen_s)
        self.is_healthy = self.ready_s is not None and since_ready_s < _HEALTHY_FOR_S
        self.hang_reason = self._why_hung(policy, now_s)
        return became_ready

    def _why_hung(self, policy: Policy, now_s: float) -> str:
        """It has not responded, has not been ready, or has been starting for too long; '': none of these.

        An instance that accepts connections but never responds is hung in any phase, even if this controller has never
        seen it healthy. One that refuses connections may still be starting, or already be stopping.
        """
        probe = self.probe
        is_silent = now_s - max(probe.response_s or 0.0, self.first_seen_s) > policy.hang_timeout_s
        if probe.timeouts >= MAX_MISSED_PROBES and is_silent:
            return f"it hangs: no response to its probes for {policy.hang_timeout_s:g} s"
        if self.phase == "stopping":
            return ""
        if self.phase == "starting":
            is_gateway = self.instance.role == "gateway"
            timeout_s = GATEWAY_START_TIMEOUT_S if is_gateway else policy.start_timeout_s
            return f"not ready within {timeout_s:g} s" if now_s - self.first_seen_s > timeout_s else ""
        if probe.failures:
            is_gone = probe.failures >= MAX_MISSED_PROBES and is_silent
            return f"no connection for {policy.hang_timeout_s:g} s: {probe.note}" if is_gone else ""
        if now_s - max(probe.ready_s or 0.0, self.first_seen_s) <= policy.unready_timeout_s:
            return ""
        return f"not ready for {policy.unready_timeout_s:g} s: {probe.note}"
