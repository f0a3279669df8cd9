"""Options of the gateway's parts, filled from its settings. A module of their own, so that reading the settings imports
neither the database nor sockets.
"""

from __future__ import annotations

from dataclasses import dataclass

from powerband.dispatch.options import DispatchOptions

NO_DESCRIPTORS = "no_descriptors"  # the gateway has reached its limit of open files; not the replica's fault


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionOptions:
    """What the account database keeps, and for how long."""

    usage_retention_days: float = 90.0  # single requests and feedback; daily sums are kept forever
    store_content: bool = False  # prompts and outputs
    redact_content: bool = True
    content_retention_days: float = 7.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Timeouts of one request to a replica, in seconds."""

    connect_s: float = 3.0
    first_byte_s: float = 60.0  # from sending the request to the first byte of the response body
    idle_s: float = 60.0  # between two reads of the response body
    total_s: float = 3600.0  # for the whole response


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions(DispatchOptions):
    """How a pool dispatches requests and probes its replicas. Times in seconds."""

    probe_interval_s: float = 0.5
    probe_timeout_s: float = 1.0
