"""What a dispatcher knows of a request before any replica has seen it."""

from __future__ import annotations

from dataclasses import dataclass

ANONYMOUS = "anonymous"

# Lower is served first: whether the request is new (1) or was accepted before (0), and its priority.
PriorityLevel = tuple[int, int]


@dataclass(slots=True, kw_only=True)
class DispatchRequest:
    """A request to be queued and sent to a backend. Times are on the clock of the dispatcher's caller."""

    tenant: str = ANONYMOUS  # whose share of the backends it takes
    prompt_tokens: int = 1  # estimated
    output_tokens: int = 1  # likely upper bound
    stream: bool = False
    priority: int = 0  # lower is served first
    arrival_s: float = 0.0
    deadline_s: float | None = None  # by which the first token is wanted
    session: str = ""  # requests with the same one build on each other
    prefix_keys: tuple[bytes, ...] = ()  # chained keys of the prompt's blocks, see `prefix`
