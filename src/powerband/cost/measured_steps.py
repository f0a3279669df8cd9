"""Seconds of a step by a StepLaw: of one model on one device, as it was measured.

  by tokens  (straight lines between measured points)      every product and norm of the layers
+ by rows    (likewise)                                    head and sampling
+ attention  (linear in what it reads and multiplies)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from powerband.spec.profile import StepLaw

_MOST_KNOWN = 4096
_GOLDEN = (5**0.5 - 1) / 2


class Line:
    """Straight lines between points, and on beyond the last; nothing at 0. Remembers what it was asked."""

    def __init__(self, places: Sequence[int], values: Sequence[float]) -> None:
        self._places, self._values = places, values
        self._known = {0: 0.0}

    def at(self, place: int) -> float:
        known = self._known.get(place)
        if known is None:
            known = self._between(place)
            if len(self._known) < _MOST_KNOWN:
                self._known[place] = known
        return known

    def _between(self, place: int) -> float:
        places, values = self._places, self._values
        if place <= places[0] or len(places) == 1:
            return values[0]
        above = min(bisect_left(places, place), len(places) - 1)
        low, high = places[above - 1], places[above]
        share = (place - low) / (high - low)
        return values[above - 1] * (1 - share) + values[above] * share


class MeasuredSteps:
    """Evaluates a StepLaw."""

    def __init__(self, law: StepLaw) -> None:
        self.law = law
        self._tokens = Line(law.tokens, law.token_s)
        self._rows = Line(law.rows, law.row_s)
        self._positions = Line(law.positions, law.position_s)

    def step_s(self, works: Sequence[tuple[int, int]], sampled: int) -> float:
        """As LatencyModel's."""
        tokens, prefill_s, decode_s = self._attention(works)
        seconds = self._tokens.at(tokens) + prefill_s + decode_s + self._rows.at(sampled)
        return seconds + self._drawn_s(works)

    def mean_s(self, works: Sequence[tuple[int, int]], sampled: int) -> float:
        """Over all steps of this shape."""
        tokens, prefill_s, decode_s = self._attention(works)
        seconds = self._tokens.at(tokens) + prefill_s + decode_s + self._rows.at(sampled)
        spread_s = self._spread_s(works)
        return seconds + sum(spread_s) / len(spread_s) if spread_s else seconds

    def parts(self, works: Sequence[tuple[int, int]], sampled: int) -> dict[str, float]:
        """Layers without attention are 'projections', sampling is in 'head'."""
        tokens, prefill_s, decode_s = self._attention(works)
        return {
            "projections": self._tokens.at(tokens) + self._drawn_s(works),
            "head": self._rows.at(sampled),
            "attention prefill": prefill_s,
            "attention decode": decode_s,
        }

    def _spread_s(self, works: Sequence[tuple[int, int]]) -> Sequence[float]:
        has_chunks = any(new > 1 for new, _ in works)
        return self.law.chunk_spread_s if has_chunks else self.law.decode_spread_s

    def _drawn_s(self, works: Sequence[tuple[int, int]]) -> float:
        """One of the spread. Which one follows from the contexts, so that a step always takes as long, while steps that
        follow each other take them in turn (multiples of the golden section).
        """
        spread = self._spread_s(works)
        if not spread:
            return 0.0
        place = 0
        for _, context in works:
            place += context
        return spread[int(place * _GOLDEN % 1.0 * len(spread))]

    def _attention(self, works: Sequence[tuple[int, int]]) -> tuple[int, float, float]:
        """(tokens of the step, seconds of prefills, seconds of decodes)."""
        law = self.law
        tokens = decodes = positions = reads = pairs = 0
        for new, context in works:
            tokens += new
            if new == 1:
                decodes += 1
                positions += context
            else:
                reads += context
                pairs += new * (2 * context - new + 1)
        chunks = len(works) - decodes
        prefill_s = law.chunk_s * chunks + law.read_s * reads + law.pair_s * pairs / 2
        decode_s = law.decode_s * decodes + self._positions.at(positions) if decodes else 0.0
        return tokens, prefill_s, decode_s
