"""What a user did to a service, into its gateway's audit log."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from powerband.bench.client.http import post
from powerband.bench.client.messages import ServerAddress as Address
from powerband.errors import PowerbandError
from powerband.fleet.service.store import ServiceStore, endpoint

_TIMEOUT_S = 3.0


def record_action(folder: ServiceStore, action: str, what: Mapping[str, Any]) -> None:
    """What is done stays done, also where nobody can write it down: a gateway that is gone, say."""
    with suppress(PowerbandError, OSError, TimeoutError, ValueError):
        url, key = endpoint(folder.name)
        address = Address(base=url, endpoint="completions", model="", headers={"Authorization": f"Bearer {key}"})
        body = {"action": f"fleet.{action}", "what": dict(what)}
        asyncio.run(post(address, "/admin/audit", body, timeout_s=_TIMEOUT_S))
