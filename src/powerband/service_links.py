"""Kubernetes puts variables into every container for each Service of its namespace ("service links").

Those of a Service whose name begins with 'powerband' look like settings: POWERBAND_PORT=tcp://10.43.1.39:8000.
https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
"""

from __future__ import annotations

import re

# By the end of the name, what the value looks like.
_ADDRESS = r"[0-9a-fA-F.:]+"
_URL = rf"(tcp|udp|sctp)://(\[{_ADDRESS}\]|{_ADDRESS}):\d+"
_LINKS = tuple(
    (re.compile(name), re.compile(value))
    for name, value in (
        (r"\w+_SERVICE_HOST", _ADDRESS),
        (r"\w+_SERVICE_PORT(_\w+)?", r"\d+"),  # with the name of the port
        (r"\w+_PORT", _URL),
        (r"\w+_PORT_\d+_(TCP|UDP|SCTP)", _URL),
        (r"\w+_PORT_\d+_(TCP|UDP|SCTP)_PROTO", r"tcp|udp|sctp"),
        (r"\w+_PORT_\d+_(TCP|UDP|SCTP)_PORT", r"\d+"),
        (r"\w+_PORT_\d+_(TCP|UDP|SCTP)_ADDR", _ADDRESS),
    )
)


def is_service_link(variable: str, value: str) -> bool:
    """Whether the variable has the name and the value of a service link; POWERBAND_PORT=8000 has not."""
    return any(name.fullmatch(variable) and shape.fullmatch(value) for name, shape in _LINKS)
