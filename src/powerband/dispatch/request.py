"""What a dispatcher knows about a request before a replica has seen it."""

from __future__ import annotations

from dataclasses import dataclass

ANONYMOUS = "anonymous"

# Lower is served first: 0 for a retry or 1 for a new request, then its priority.
PriorityLevel = tuple[int, int]


@dataclass(slots=True, kw_only=True)
class DispatchRequest:
    """A request to queue and send to a backend. Times are on the clock of the dispatcher's caller."""

    tenant: str = ANONYMOUS  # the owner, for fair queuing and retry budgets
    prompt_tokens: int = 1  # estimated
    output_tokens: int = 1  # likely upper bound
    stream: bool = False
    priority: int = 0  # lower is served first
    arrival_s: float = 0.0
    deadline_s: float | None = None  # by which the first token is wanted
    session: str = ""  # requests of one session share a growing prompt prefix
    prefix_keys: tuple[bytes, ...] = ()  # chained keys of the prompt's blocks, see `prefix`
