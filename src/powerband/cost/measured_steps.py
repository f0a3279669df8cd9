"""Seconds of a step by a StepTimeModel: of one model on one device, as it was measured.

  by tokens  (straight lines between measured points)      every product and norm of the layers
+ by rows    (likewise)                                    head and sampling
+ attention  (linear in what it reads and multiplies)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from powerband.spec.hardware.profile import StepTimeModel

_MAX_CACHED = 4096
_GOLDEN = (5**0.5 - 1) / 2


class PiecewiseLinear:
    """Straight lines between points, and on beyond the last; nothing at 0. Remembers what it was asked."""

    def __init__(self, xs: Sequence[int], values: Sequence[float]) -> None:
        self._xs, self._values = xs, values
        self._known = {0: 0.0}

    def at(self, x: int) -> float:
        known = self._known.get(x)
        if known is None:
            known = self._between(x)
            if len(self._known) < _MAX_CACHED:
                self._known[x] = known
        return known

    def _between(self, x: int) -> float:
        xs, values = self._xs, self._values
        if x <= xs[0] or len(xs) == 1:
            return values[0]
        above = min(bisect_left(xs, x), len(xs) - 1)
        low, high = xs[above - 1], xs[above]
        share = (x - low) / (high - low)
        return values[above - 1] * (1 - share) + values[above] * share


class MeasuredStepTimes:
    """Evaluates a StepTimeModel."""

    def __init__(self, model: StepTimeModel) -> None:
        self.model = model
        self._tokens = PiecewiseLinear(model.tokens, model.token_s)
        self._rows = PiecewiseLinear(model.rows, model.row_s)
        self._positions = PiecewiseLinear(model.positions, model.position_s)

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
        return self.model.chunk_spread_s if has_chunks else self.model.decode_spread_s

    def _drawn_s(self, works: Sequence[tuple[int, int]]) -> float:
        """One of the spread. Which one follows from the contexts, so that a step always takes as long, while steps that
        follow each other take them in turn (multiples of the golden section).
        """
        spread = self._spread_s(works)
        if not spread:
            return 0.0
        x = 0
        for _, context in works:
            x += context
        return spread[int(x * _GOLDEN % 1.0 * len(spread))]

    def _attention(self, works: Sequence[tuple[int, int]]) -> tuple[int, float, float]:
        """(tokens of the step, seconds of prefills, seconds of decodes)."""
        model = self.model
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
        prefill_s = model.chunk_s * chunks + model.read_s * reads + model.pair_s * pairs / 2
        decode_s = model.decode_s * decodes + self._positions.at(positions) if decodes else 0.0
        return tokens, prefill_s, decode_s
