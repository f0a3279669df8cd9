"""W3C trace context: which trace a request belongs to, received from the client and propagated to replicas.

    client's span ──► gateway's span ──► gateway's span of the upstream request ──► replica's span

Without tracing at the gateway, the client's context is passed on unchanged.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_MAX_STATE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceContext:
    """Ids in hexadecimal. parent_id: the client's span; '': none. span_id: the gateway's span. exchange_id: the span of
    its request to a replica, the parent of the replica's span. state: `tracestate`, passed on unchanged.
    """

    trace_id: str
    parent_id: str
    span_id: str
    exchange_id: str
    is_sampled: bool
    state: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """The headers to send to a replica."""
        found = {"traceparent": f"00-{self.trace_id}-{self.exchange_id}-{'01' if self.is_sampled else '00'}"}
        return {**found, "tracestate": self.state} if self.state else found


def forwarded_trace(headers: Mapping[str, str]) -> TraceContext | None:
    """The client's own context; None: it sent none, or an invalid one."""
    sent = _read(headers)
    if sent is None:
        return None
    trace_id, parent_id, is_sampled = sent
    return TraceContext(
        trace_id=trace_id,
        parent_id=parent_id,
        span_id=parent_id,
        exchange_id=parent_id,
        is_sampled=is_sampled,
        state=_state(headers),
    )


def continue_trace(headers: Mapping[str, str], share: float = 1.0) -> TraceContext:
    """Add the gateway's spans below the client's span, or start a new trace. share: of new traces that are sampled."""
    sent = _read(headers)
    if sent is None:
        sent = f"{random.getrandbits(128) or 1:032x}", "", random.random() < share  # noqa: S311 (ids, no secrets)
    trace_id, parent_id, is_sampled = sent
    return TraceContext(
        trace_id=trace_id,
        parent_id=parent_id,
        span_id=new_span_id(),
        exchange_id=new_span_id(),
        is_sampled=is_sampled,
        state=_state(headers) if parent_id else "",
    )


def new_span_id() -> str:
    """Random, in hexadecimal."""
    return f"{random.getrandbits(64) or 1:016x}"


def _read(headers: Mapping[str, str]) -> tuple[str, str, bool] | None:
    found = _TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    if found is None:
        return None
    version, trace_id, parent_id, flags = found.groups()
    if version == "ff" or not int(trace_id, 16) or not int(parent_id, 16):
        return None
    return trace_id, parent_id, bool(int(flags, 16) & 1)


def _state(headers: Mapping[str, str]) -> str:
    state = headers.get("tracestate", "")
    return state if len(state) <= _MAX_STATE and state.isascii() and state.isprintable() else ""
