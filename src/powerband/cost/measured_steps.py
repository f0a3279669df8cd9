"""Seconds of a step by a StepLaw: of one model on one device, as it was measured.

  by tokens  (straight lines between measured points)      every product and norm of the layers
+ by rows    (likewise)                                    head and sampling
+ attention  (linear in what it reads and multiplies)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from powerband.spec.profile import StepLaw


class Line:
    """Straight lines between points, and on beyond the last; nothing at 0. Remembers what it was asked."""

    def __init__(self, places: Sequence[int], values: Sequence[float]) -> None:
        self._places, self._values = places, values
        self._known = {0: 0.0}

    def at(self, place: int) -> float:
        known = self._known.get(place)
        if known is None:
            known = self._known[place] = self._between(place)
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

    def step_s(self, works: Sequence[tuple[int, int]], sampled: int) -> float:
        """As LatencyModel's."""
        tokens, prefill_s, decode_s = self._attention(works)
        return self._tokens.at(tokens) + prefill_s + decode_s + self._rows.at(sampled)

    def parts(self, works: Sequence[tuple[int, int]], sampled: int) -> dict[str, float]:
        """Layers without attention are 'projections', sampling is in 'head'."""
        tokens, prefill_s, decode_s = self._attention(works)
        return {
            "projections": self._tokens.at(tokens),
            "head": self._rows.at(sampled),
            "attention prefill": prefill_s,
            "attention decode": decode_s,
        }

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
        decode_s = law.decodes_s + law.decode_s * decodes + law.position_s * positions if decodes else 0.0
        return tokens, prefill_s, decode_s
