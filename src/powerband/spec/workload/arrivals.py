"""When requests arrive. An open loop does not wait for answers; a closed loop is a number of users who do.

An open loop is a renewal process of unit rate, stretched by a rate that may change:

    gaps of mean 1: all 1 (constant) · exponential (Poisson) · gamma (burstier or smoother)
          │ summed, then mapped through the inverse of the rate's integral
    phases: from rate to rate in so many seconds, one after the other (ramp, steps)

So the same seed at twice the rate is the same sequence twice as fast, and two runs can be compared pair by pair. The
process is looked at as if it had always been running (Cox 1962, Renewal Theory, 5.2): its first gap began before, so
that in any stretch as many arrivals are expected as the rate says, however bursty it is.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from powerband.errors import UsageError
from powerband.spec.config_reader import shown

MAX_RATE = 1e6
MAX_CONCURRENCY = 100_000
MAX_BURSTINESS = 1e6  # smoother than anyone can tell from constant


@dataclass(frozen=True, slots=True)
class RatePhase:
    """`seconds` in which the rate goes from `start` to `end` arrivals a second, in a straight line."""

    start: float
    end: float
    seconds: float = math.inf

    def __post_init__(self) -> None:
        if not (0 <= self.start <= MAX_RATE and 0 <= self.end <= MAX_RATE and self.seconds > 0):
            raise UsageError(
                f"The load goes from {self.start:g} to {self.end:g} requests a second in {self.seconds:g} s.",
                hint=f"Rates lie between 0 and {MAX_RATE:g}, the time above 0.",
            )
        if self.start != self.end and math.isinf(self.seconds):
            raise UsageError("A ramp needs a duration in seconds.", param="ramp")

    @property
    def arrivals(self) -> float:
        """Expected in the whole phase."""
        return 0.0 if self.start == self.end == 0 else (self.start + self.end) / 2 * self.seconds

    def time_of(self, arrivals: float) -> float:
        """Seconds into the phase by which so many are expected."""
        if arrivals <= 0:
            return 0.0
        if self.start == self.end:
            return arrivals / self.start
        slope = (self.end - self.start) / self.seconds
        # start·t + slope·t²/2 = arrivals, in the form that does not cancel
        root = math.sqrt(max(self.start**2 + 2 * slope * arrivals, 0.0))
        return min(2 * arrivals / (self.start + root), self.seconds)


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """burstiness: the shape of gamma-distributed gaps, as in vLLM: 1 is Poisson, below 1 burstier (the gaps'
    coefficient of variation is 1/√burstiness), above 1 smoother, infinity constant.
    """

    phases: tuple[RatePhase, ...]
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        if not self.phases or all(phase.arrivals == 0 for phase in self.phases):
            raise UsageError("The rate is 0: nothing would arrive.", hint="It must be above 0, like 8.", param="rate")
        if any(math.isinf(phase.seconds) for phase in self.phases[:-1]):
            raise UsageError("Only the last phase may have no end.", param="steps")
        if not (0.01 <= self.burstiness <= MAX_BURSTINESS or self.burstiness == math.inf):
            raise UsageError(
                f"burstiness is {self.burstiness:g}.",
                hint=f"It lies between 0.01 and {MAX_BURSTINESS:g}, or is inf: constant.",
                param="burstiness",
            )

    @classmethod
    def at(cls, rate: float, burstiness: float = 1.0) -> OpenLoop:
        """At one rate (requests a second) for as long as it is asked."""
        return cls((RatePhase(rate, rate),), burstiness)

    def times(self, generator: random.Random) -> Iterator[float]:
        """Arrivals in seconds from the start, without end unless the last phase ends."""
        start_s, before = 0.0, 0.0  # of the phase: when it starts, and arrivals expected until then
        last_s = 0.0
        phases = iter(self.phases)
        phase = next(phases)
        for count in self._counts(generator):
            while count - before >= phase.arrivals:
                before += phase.arrivals
                start_s += phase.seconds
                following = next(phases, None)
                if following is None:
                    return
                phase = following
            last_s = max(start_s + phase.time_of(count - before), last_s)  # roots of neighbours round as they like
            yield last_s

    def _counts(self, generator: random.Random) -> Iterator[float]:
        """The process at unit rate."""
        shape = self.burstiness
        if math.isinf(shape):
            yield from itertools.count(0.5)
        # A gap that one falls into is drawn by its length; what remains of it, uniformly.
        count = generator.random() * generator.gammavariate(shape + 1, 1 / shape)
        while True:
            yield count
            count += generator.expovariate(1.0) if shape == 1 else generator.gammavariate(shape, 1 / shape)


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """`concurrency` users; each sends its next request some time after the answer to its last: exponential, with a mean
    of `think_s`; 0: at once.
    """

    concurrency: int
    think_s: float = 0.0

    def __post_init__(self) -> None:
        is_whole = isinstance(self.concurrency, int) and not isinstance(self.concurrency, bool)
        if not is_whole or not 1 <= self.concurrency <= MAX_CONCURRENCY or not 0 <= self.think_s < math.inf:
            raise UsageError(
                f"The load has {shown(self.concurrency)} users, who wait {shown(self.think_s)} s between requests.",
                hint=f"Concurrency is a whole number between 1 and {MAX_CONCURRENCY}; the time is 0 or more.",
                param="concurrency",
            )


@dataclass(frozen=True, slots=True)
class Replay:
    """At the times of a trace, `speedup` times as fast."""

    speedup: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.speedup <= MAX_RATE:
            raise UsageError(
                f"speedup is {self.speedup:g}.", hint=f"It lies above 0, up to {MAX_RATE:g}.", param="speedup"
            )


Arrivals = OpenLoop | ClosedLoop | Replay


def arrivals_as_dict(arrivals: Arrivals) -> dict[str, Any]:
    """Numbers only; what is infinite is null."""
    match arrivals:
        case OpenLoop():
            phases = [
                {**asdict(phase), "seconds": None if math.isinf(phase.seconds) else phase.seconds}
                for phase in arrivals.phases
            ]
            burstiness = None if math.isinf(arrivals.burstiness) else arrivals.burstiness
            return {"kind": "open", "phases": phases, "burstiness": burstiness}
        case ClosedLoop():
            return {"kind": "closed", **asdict(arrivals)}
        case Replay():
            return {"kind": "replay", **asdict(arrivals)}


def arrivals_from_dict(values: Any) -> Arrivals:
    """The inverse. Raises UsageError."""
    try:
        rest = dict(values)
        match rest.pop("kind"):
            case "open":
                phases = tuple(
                    RatePhase(**{**phase, "seconds": _or_inf(phase.get("seconds"))}) for phase in rest["phases"]
                )
                return OpenLoop(**{**rest, "phases": phases, "burstiness": _or_inf(rest.get("burstiness", 1.0))})
            case "closed":
                return ClosedLoop(**rest)
            case "replay":
                return Replay(**rest)
    except (TypeError, KeyError, AttributeError, OverflowError, ValueError):
        pass
    raise UsageError(
        f"arrivals are {shown(values)}, which is not an arrival process.",
        hint="kind is open (phases, burstiness), closed (concurrency, think_s) or replay (speedup).",
        param="arrivals",
    )


def _or_inf(value: Any) -> Any:
    return math.inf if value is None else value
