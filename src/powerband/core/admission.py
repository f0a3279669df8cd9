"""Whether to take a request at all: refuse early, with an honest time to come back, rather than miss late."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from powerband.core.request import Request
from powerband.errors import QueueFull, UsageError

WINDOW = 64  # most recent starts from which the queue's speed is estimated
UNKNOWN_RETRY_S = 1.0  # before anything has started
MAX_RETRY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """The limits of one replica's scheduler; names and meanings as in EngineSettings."""

    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    long_prefill_token_threshold: int = 0  # 0: the budget
    max_num_queued_reqs: int = 2048
    max_num_queued_tokens: int = 4_000_000

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_queued_reqs", "max_num_queued_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1.", param=name)
        if self.long_prefill_token_threshold < 0:
            raise UsageError(
                f"long_prefill_token_threshold is {self.long_prefill_token_threshold}; it must be 0 (off) or more.",
                param="long_prefill_token_threshold",
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is less than max_num_seqs"
                f" ({self.max_num_seqs}): running requests could not all advance in a step.",
                hint="Raise max_num_batched_tokens or lower max_num_seqs.",
                param="max_num_batched_tokens",
            )


class Admission:
    """Limits the queue, and measures how fast it moves.

    `estimate_s(tokens_ahead, prompt_tokens)`: seconds until the first token of a prompt behind `tokens_ahead` other
    prompt tokens. With it, requests whose deadline is out of reach are refused.
    """

    def __init__(self, limits: SchedulerLimits, estimate_s: Callable[[int, int], float] | None = None) -> None:
        self.limits = limits
        self.estimate_s = estimate_s
        self.num_refused = 0
        self._starts: deque[float] = deque(maxlen=WINDOW)
        self._tickets = 0  # refusals for which no start has happened since

    def check_queue(
        self, num_tokens: int, num_waiting: int, num_waiting_tokens: int, num_slots: int, now: float
    ) -> None:
        """Raise QueueFull if the queue cannot take `num_tokens` more. `num_slots`: free seats among the running."""
        limits = self.limits
        if num_waiting >= limits.max_num_queued_reqs + num_slots:
            what = f"requests waiting: {num_waiting}; the limit is {limits.max_num_queued_reqs}"
        # An empty queue takes any prompt, or a long one could never come in.
        elif num_waiting and num_waiting_tokens + num_tokens > limits.max_num_queued_tokens:
            what = (
                f"{num_waiting_tokens} prompt tokens are waiting and this request has {num_tokens};"
                f" the limit is {limits.max_num_queued_tokens}"
            )
        else:
            return
        retry_after_s = self._refuse(now)
        raise QueueFull(
            f"The queue is full: {what}.",
            retry_after_s=retry_after_s,
            hint=f"Try again in {retry_after_s:.1f} s, or add replicas.",
        )

    def check_deadline(self, r: Request, tokens_ahead: int, now: float) -> None:
        """Raise QueueFull if `r` names a deadline that the estimate cannot meet."""
        if r.deadline_s is None or self.estimate_s is None:
            return
        first_token_s = now + self.estimate_s(tokens_ahead, len(r.tokens))
        if first_token_s <= r.deadline_s:
            return
        late_s = first_token_s - r.deadline_s
        self._refuse(now)
        raise QueueFull(
            f"The first token would come {late_s:.2f} s after the deadline: {tokens_ahead} prompt tokens are ahead.",
            retry_after_s=min(late_s, MAX_RETRY_S),
            hint="Allow more time, or send it to another replica.",
            code="deadline_infeasible",
        )

    def started(self, now: float) -> None:
        """A request left the queue and began to run."""
        self._starts.append(now)
        self._tickets = max(self._tickets - 1, 0)

    def _refuse(self, now: float) -> float:
        """Return when to retry: later for each further refusal, so that clients do not all return at once."""
        self.num_refused += 1
        self._tickets += 1
        if len(self._starts) < 2 or now <= self._starts[0]:
            return UNKNOWN_RETRY_S
        starts_per_s = (len(self._starts) - 1) / (now - self._starts[0])
        return min(self._tickets / starts_per_s, MAX_RETRY_S)
