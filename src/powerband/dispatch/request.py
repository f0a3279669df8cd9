"""What a dispatcher knows about a request before a replica has seen it."""

from __future__ import annotations

from dataclasses import dataclass

ANONYMOUS = "anonymous"

# From so many crashes on, a request runs in quarantine: no other one that is in quarantine starts beside it.
CRASHES_TO_QUARANTINE = 2

# Lower is served first: -1 for a retry in quarantine, 0 for another retry, 1 for a new request; then its priority.
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
    backends: frozenset[str] | None = None  # ids of those that can serve it; None: all
    num_crashes: int = 0  # of replicas that crashed or hung while they ran it, and for which it may be the cause
    crashed_s: float | None = None  # the last crash; the next replica must have shown life since then

    @property
    def is_quarantined(self) -> bool:
        return self.num_crashes >= CRASHES_TO_QUARANTINE
