"""The gateway of a service: its own, at an address that is checked before anything starts, or another service's."""

from __future__ import annotations

from typing import Literal

from powerband.errors import UsageError
from powerband.fleet.service.spec import GatewaySpec, ServiceSpec
from powerband.fleet.service.store import ServiceStore, find_service, services_behind
from powerband.web.access import is_loopback
from powerband.web.listening import check_port, free_port, is_port_free

DEFAULT_PORT = 8000


def own_gateway(
    host: str,
    port: int | None,
    auth: Literal["open", "keys"] | None,
    arguments: tuple[str, ...],
    current: ServiceSpec | None,
) -> GatewaySpec:
    """The given port, else that of the current service, else a free one. Raises UsageError and EnvironmentFault."""
    is_open = is_loopback(host)
    auth = auth or ("open" if is_open else "keys")
    if auth == "open" and not is_open:
        raise UsageError(
            f"Listening on {host} without keys would let anyone use the replicas.",
            hint="Leave out --auth open.",
            param="auth",
        )
    if port is not None and not 1 <= port <= 65535:
        raise UsageError(
            f"port is {port}; it must be between 1 and 65535.",
            hint="Without --port a free one is chosen.",
            param="port",
        )
    if current is not None and not current.removed and port in (None, current.gateway.port):
        return GatewaySpec(host=host, port=current.gateway.port, auth=auth, arguments=arguments)
    if port is None:
        port = DEFAULT_PORT if is_port_free(host, DEFAULT_PORT) else free_port(host)
    else:
        check_port(host, port)
    return GatewaySpec(host=host, port=port, auth=auth, arguments=arguments)


def shared_gateway(owner: str, served_name: str, store: ServiceStore) -> GatewaySpec:
    """The gateway of another service, to which this service's model is added. Raises UsageError."""
    if "://" in owner:
        raise UsageError(
            f"--gateway is {owner!r}: it takes the name of a deployed service, not the URL of a gateway.",
            hint="'powerband status' shows the services. For any other gateway, deploy without --gateway, and add the "
            "address of this service to its routes: PUT /admin/routes/NAME (docs/operating.md).",
            param="gateway",
        )
    found = find_service(owner)
    spec = found.read_spec()
    if spec is None or spec.removed or found.name == store.name:
        raise UsageError(f"The service {owner!r} has no gateway to add a model to.", param="gateway")
    if spec.gateway_service:
        raise UsageError(
            f"The service {owner} has no gateway of its own: it is behind that of {spec.gateway_service}.",
            hint=f"Use --gateway {spec.gateway_service}.",
            param="gateway",
        )
    others = [spec, *(one.read_spec() for one in services_behind(found) if one.name != store.name)]
    if any(one is not None and one.release.served_name == served_name for one in others):
        raise UsageError(
            f"The gateway of {owner} already serves a model called {served_name}.",
            hint="Give this one another --served-model-name.",
            param="gateway",
        )
    return spec.gateway
