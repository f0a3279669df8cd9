"""How long prompts and outputs are: distributions of token counts, drawn from a generator that the caller seeds."""

from __future__ import annotations

import bisect
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import accumulate
from statistics import NormalDist
from typing import Any, Protocol

from powerband.errors import UsageError
from powerband.spec.config_reader import shown

MAX_TOKENS = 1 << 24
_INVERSE = NormalDist()


class Lengths(Protocol):
    """A distribution over whole numbers of tokens, at least 1."""

    def draw(self, generator: random.Random) -> int:
        """One length."""
        ...

    @property
    def mean(self) -> float: ...

    @property
    def maximum(self) -> int:
        """No length is greater."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    tokens: int

    def __post_init__(self) -> None:
        _check(self.tokens, self.tokens)

    def draw(self, generator: random.Random) -> int:  # noqa: ARG002 (as the protocol says)
        return self.tokens

    @property
    def mean(self) -> float:
        return float(self.tokens)

    @property
    def maximum(self) -> int:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every length from `low` to `high` alike."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _check(self.low, self.high)

    def draw(self, generator: random.Random) -> int:
        return self.low + int(generator.random() * (self.high - self.low + 1))

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2

    @property
    def maximum(self) -> int:
        return self.high


@dataclass(frozen=True, slots=True)
class LogNormal:
    """exp(N(log median, sigma²)), rounded; what lies outside [low, high] counts as the bound."""

    median: float
    sigma: float
    low: int = 1
    high: int = MAX_TOKENS

    def __post_init__(self) -> None:
        _check(self.low, self.high)
        if not (0 < self.median <= MAX_TOKENS and 0 <= self.sigma <= 10):
            raise UsageError(
                f"A lognormal length has median {self.median:g} and sigma {self.sigma:g}.",
                hint=f"The median lies above 0 and up to {MAX_TOKENS}, sigma between 0 and 10.",
            )

    def draw(self, generator: random.Random) -> int:
        value = self.median * math.exp(self.sigma * _normal(generator))
        return min(max(round(value), self.low), self.high)

    @property
    def mean(self) -> float:
        """Between its bounds. What is rounded within them keeps its mean; what is beyond becomes the bound."""
        if self.low == self.high:
            return float(self.low)
        low, high = self.low + 0.5, self.high - 0.5  # from where lengths are rounded to a bound
        whole = self.median * math.exp(self.sigma**2 / 2)
        inside = whole * (self._below(high, self.sigma) - self._below(low, self.sigma))
        return self._below(low) * self.low + inside + (1 - self._below(high)) * self.high

    @property
    def maximum(self) -> int:
        return self.high

    def _below(self, tokens: float, shift: float = 0.0) -> float:
        """Share of the distribution below `tokens`; with shift = sigma, share of its sum."""
        if self.sigma == 0:
            return float(tokens > self.median)
        return 0.5 * math.erfc(-(math.log(tokens / self.median) / self.sigma - shift) / math.sqrt(2))


@dataclass(frozen=True, slots=True)
class Empirical:
    """Lengths as they were observed, each with a weight; without weights all alike."""

    values: tuple[int, ...]
    weights: tuple[float, ...] = ()
    _cumulative: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.values or len(self.weights) not in (0, len(self.values)):
            raise UsageError("An empirical distribution needs values, and as many weights or none.")
        for value in self.values:
            _check(value, value)
        if not all(weight >= 0 for weight in self.weights) or not 0 < sum(self.weights or (1,)) < math.inf:
            raise UsageError("The weights of an empirical distribution must be 0 or more, and not all 0.")
        object.__setattr__(self, "_cumulative", tuple(accumulate(self.weights or (1,) * len(self.values))))

    def draw(self, generator: random.Random) -> int:
        place = generator.random() * self._cumulative[-1]
        return self.values[bisect.bisect_right(self._cumulative, place, hi=len(self.values) - 1)]

    @property
    def mean(self) -> float:
        weights = self.weights or (1,) * len(self.values)
        return sum(value * weight for value, weight in zip(self.values, weights, strict=True)) / self._cumulative[-1]

    @property
    def maximum(self) -> int:
        return max(self.values)


KINDS: dict[str, type[Any]] = {"fixed": Fixed, "uniform": Uniform, "lognormal": LogNormal, "empirical": Empirical}


def parse_lengths(text: str, *, param: str) -> Lengths:
    """'512', '128-1024' (uniform), 'lognormal:median=512,sigma=0.8[,low=1][,high=4096]'. Raises UsageError."""
    try:
        return _parsed(text)
    except UsageError as problem:
        raise _wrong(param, text, problem.message) from None
    except (ValueError, TypeError):
        raise _wrong(param, text, "no distribution of lengths.") from None


def _parsed(text: str) -> Lengths:
    if found := re.fullmatch(r"\s*+(\d{1,9})\s*+(?:-\s*+(\d{1,9})\s*+)?", text):
        return Uniform(int(found[1]), int(found[2])) if found[2] else Fixed(int(found[1]))
    kind, _, rest = text.partition(":")
    if kind.strip() != "lognormal":
        raise ValueError
    pairs = [part.split("=") for part in rest.split(",")]
    values = {name.strip(): value for name, value in pairs}
    if len(values) != len(pairs):
        raise ValueError
    readers: dict[str, Callable[[str], Any]] = {"median": float, "sigma": float, "low": int, "high": int}
    return LogNormal(**{name: readers.get(name, str)(value) for name, value in values.items()})


def lengths_as_dict(lengths: Any) -> dict[str, Any]:
    kind = next(name for name, made in KINDS.items() if isinstance(lengths, made))
    return {"kind": kind, **{f.name: getattr(lengths, f.name) for f in fields(lengths) if f.init}}


def lengths_from_dict(values: Any, *, param: str) -> Lengths:
    """The inverse. Raises UsageError naming `param`."""
    try:
        rest: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        made: Lengths = KINDS[rest.pop("kind")](**rest)
    except UsageError as problem:
        raise _wrong(param, shown(values), problem.message) from None
    except (TypeError, KeyError, AttributeError, OverflowError):
        raise _wrong(param, shown(values), f"no distribution of lengths; kinds: {', '.join(KINDS)}.") from None
    return made


def _wrong(param: str, value: str, why: str) -> UsageError:
    return UsageError(
        f"{param} is {value}: {why}",
        hint="Write 512, 128-1024, or lognormal:median=512,sigma=0.8,high=4096.",
        param=param,
    )


def _normal(generator: random.Random) -> float:
    """By inversion, from one uniform number: so each length takes one draw, whatever the distribution."""
    uniform = generator.random()
    return _INVERSE.inv_cdf(min(max(uniform, 1e-15), 1 - 1e-15))


def _check(low: int, high: int) -> None:
    are_whole = all(isinstance(bound, int) and not isinstance(bound, bool) for bound in (low, high))
    if not are_whole or not 1 <= low <= high <= MAX_TOKENS:
        raise UsageError(f"A length from {shown(low)} to {shown(high)} tokens; it lies between 1 and {MAX_TOKENS}.")
