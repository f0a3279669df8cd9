"""The gateway of another service, which serves this service's model beside its own."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from powerband.errors import PowerbandError
from powerband.fleet.control.gateway_client import GatewayClient
from powerband.fleet.service.status import GatewayPhase, GatewayStatus
from powerband.fleet.service.store import ServiceStore


@dataclass(slots=True)
class SharedGateway:
    """owner: the name of the other service. pid: of the gateway that the client is connected to; 0: of none."""

    owner: str
    client: GatewayClient
    pid: int
    found: GatewayStatus | None = None  # as the owner's controller reports it; None: the owner is gone

    def __post_init__(self) -> None:
        self.client.is_owner = False

    def follow(self) -> None:
        """Read the owner's status, and connect again when its gateway was restarted."""
        self.found = None
        store = ServiceStore.named(self.owner)
        try:
            status = store.read_status() if store.exists() else None
        except PowerbandError:
            return  # its own commands say what is wrong with it
        if status is None:
            return
        self.found = status.gateway
        if self.found.pid and (self.found.url, self.found.pid) != (self.client.url, self.pid):
            self.client.connect_to(self.found.url)
            self.pid = self.found.pid

    def status(self, *, is_removed: bool) -> GatewayStatus:
        """Ready: it has the model's route. Down: it serves nothing of this service any more, or does not run."""
        found, snapshot = self.found, self.client.snapshot
        if found is None:
            return GatewayStatus(state="down", url=self.client.url, note=f"The service {self.owner} is gone.")
        if found.state != "ready":
            # While it restarts, it is not certain that it has forgotten the model.
            return msgspec.structs.replace(found, state="starting") if is_removed else found
        has_route = snapshot is not None and snapshot.route_revision != ""
        state: GatewayPhase = "starting"
        if has_route and not is_removed:
            state = "ready"
        elif snapshot is not None and not has_route and is_removed:
            state = "down"
        return msgspec.structs.replace(found, state=state, note=self.client.error)
