"""From measured steps of one model to its StepLaw, and from steps under load to its HostLaw.

Everything is linear in coefficients that are not negative, so that the fit has one answer, more work never takes less
time, and a minute of steps is enough.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

import numpy as np

from powerband.cost.fit import Errors
from powerband.cost.least_squares import Array, robust
from powerband.cost.measured_steps import MeasuredSteps
from powerband.cost.steps import StepSample
from powerband.errors import UsageError
from powerband.spec.profile import StepLaw

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
ROWS = (1, 4, 16, 64, 256)
_SCALE = 0.03  # relative: what lies further off counts less
_FEWEST = 8
_FEWEST_AT_REST = 3
_TIMES = ("decodes_s", "decode_s", "position_s", "chunk_s", "pair_s", "read_s")


def fit_steps(samples: Sequence[StepSample]) -> StepLaw:
    """Raises UsageError for too few samples."""
    if len(samples) < _FEWEST:
        raise UsageError(f"{len(samples)} steps are too few to fit a law to.", hint="Let the engine work for longer.")
    tokens = _knots(TOKENS, [sample.num_tokens for sample in samples])
    rows = _knots(ROWS, [sample.sampled for sample in samples])
    seconds = np.array([sample.seconds for sample in samples])
    matrix = np.array([_features(sample, tokens, rows) for sample in samples]) / seconds[:, None]
    found = robust(matrix, np.ones(len(samples)), scale=_SCALE)
    num_tokens, num_rows = len(tokens), len(rows)
    attention = (float(value) for value in found[num_tokens + num_rows :])
    return StepLaw(
        tokens=tokens,
        token_s=_rising(found[:num_tokens]),
        rows=rows,
        row_s=_rising(found[num_tokens : num_tokens + num_rows]),
        **dict(zip(_TIMES, attention, strict=True)),
    )


def held_out_error(samples: Sequence[StepSample], folds: int = 4) -> Errors:
    """Of laws that were fitted without the steps that they are asked about."""
    predicted, measured = [], []
    for fold in range(folds):
        law = MeasuredSteps(fit_steps([s for i, s in enumerate(samples) if i % folds != fold]))
        for sample in samples[fold::folds]:
            predicted.append(law.step_s(sample.works, sample.sampled))
            measured.append(sample.seconds)
    return Errors.of(predicted, measured)


def error_of(law: StepLaw, samples: Sequence[StepSample]) -> Errors:
    """On the samples themselves."""
    model = MeasuredSteps(law)
    return Errors.of([model.step_s(s.works, s.sampled) for s in samples], [s.seconds for s in samples])


def _knots(places: Sequence[int], seen: Sequence[int]) -> tuple[int, ...]:
    """Those places between which something was seen, the first and one beyond the last among them."""
    found = {places[0]}
    for value in seen:
        if value <= 0:
            continue
        above = next((place for place in places if place >= value), places[-1])
        found.add(above)
    return tuple(sorted(found))


def _features(sample: StepSample, tokens: Sequence[int], rows: Sequence[int]) -> list[float]:
    decodes = [context for new, context in sample.works if new == 1]
    chunks = [(new, context) for new, context in sample.works if new > 1]
    return [
        *_ramps(tokens, sample.num_tokens),
        *(_ramps(rows, sample.sampled) if sample.sampled else [0.0] * len(rows)),
        float(bool(decodes)),
        float(len(decodes)),
        float(sum(decodes)),
        float(len(chunks)),
        sum(new * (2 * context - new + 1) / 2 for new, context in chunks),
        float(sum(context for _, context in chunks)),
    ]


def _ramps(places: Sequence[int], value: int) -> list[float]:
    """How far `value` is up each interval: 1 at its end and beyond; beyond the last, further on."""
    ramps = [1.0]
    for low, high in pairwise(places):
        share = max((value - low) / (high - low), 0.0)
        ramps.append(share if high == places[-1] else min(share, 1.0))
    return ramps


def _rising(increments: Array) -> tuple[float, ...]:
    return tuple(float(value) for value in np.cumsum(increments))


@dataclass(frozen=True, slots=True)
class Cycle:
    """From a step's end to the next one's, with no pause between: what the host's share is fitted to."""

    seconds: float
    model_s: float  # of the step alone, predicted
    requests: int
    new: int  # of them


def busy_cycles(samples: Sequence[StepSample], law: StepLaw, pause_s: float) -> list[Cycle]:
    """Of steps that were submitted within `pause_s` of the end of the one before: the engine had no rest between."""
    model = MeasuredSteps(law)
    cycles = []
    for before, sample in pairwise(samples):
        if sample.at_s - before.end_s < pause_s:
            new = sum(num > 1 for num, _ in sample.works)
            cycles.append(
                Cycle(sample.end_s - before.end_s, model.step_s(sample.works, sample.sampled), len(sample.works), new)
            )
    return cycles


@dataclass(frozen=True, slots=True)
class HostShare:
    """seconds of a cycle = slowdown · the step's own + step_s + per_request_s · requests + per_new_s · new ones."""

    slowdown: float
    step_s: float
    per_request_s: float
    per_new_s: float


def fit_host(cycles: Sequence[Cycle]) -> HostShare:
    """slowdown is at least 1. Outliers, which something else on the machine caused, are left out."""
    if len(cycles) < _FEWEST:
        raise UsageError(f"{len(cycles)} steps without a pause are too few.", hint="Load the engine for longer.")
    seconds = np.array([cycle.seconds for cycle in cycles])
    alone = np.array([cycle.model_s for cycle in cycles])
    matrix = np.array([[c.model_s, 1.0, c.requests, c.new] for c in cycles])
    found = robust(matrix / seconds[:, None], (seconds - alone) / seconds, scale=0.1)
    slowdown, step_s, per_request_s, per_new_s = (float(value) for value in found)
    predicted = alone + matrix @ found
    usual = np.abs(seconds / predicted - 1) < 1.0
    scale = fmean(seconds[usual]) / fmean(predicted[usual])  # means are what is promised, so these must agree
    return HostShare(max((1 + slowdown) * scale, 1.0), step_s * scale, per_request_s * scale, per_new_s * scale)


def slowed(law: StepLaw, factor: float) -> StepLaw:
    """Every time of it, times `factor`."""
    return replace(
        law,
        token_s=tuple(factor * value for value in law.token_s),
        row_s=tuple(factor * value for value in law.row_s),
        **{name: factor * getattr(law, name) for name in _TIMES},
    )


@dataclass(frozen=True, slots=True)
class Journey:
    """A request as its client saw it. Times on the clock of the engine's log."""

    sent_s: float
    chunks_s: tuple[float, ...]
    prompt_tokens: int


def fit_arrival(journeys: Sequence[Journey], samples: Sequence[StepSample], step_s: float) -> tuple[float, float]:
    """(seconds, seconds per prompt token) from sending until the engine knows it, of requests that found it at rest.

    step_s: the host's own, which lies between. Raises UsageError where there was none.
    """
    starts = [sample.at_s for sample in samples]
    prompts, seconds = [], []
    for journey in journeys:
        place = bisect_left(starts, journey.sent_s)
        at_rest = 0 < place < len(samples) and samples[place - 1].end_s < journey.sent_s
        if at_rest and starts[place] < journey.chunks_s[0]:
            prompts.append(float(journey.prompt_tokens))
            seconds.append(max(starts[place] - journey.sent_s - step_s, 1e-6))
    if len(seconds) < _FEWEST_AT_REST:
        raise UsageError(f"{len(seconds)} requests found the engine at rest; that is too few.", hint="Load it longer.")
    wanted = np.array(seconds)
    matrix = np.stack([np.ones(len(prompts)), np.array(prompts)], axis=1)
    found = robust(matrix / wanted[:, None], np.ones(len(wanted)), scale=0.1)
    return float(found[0]), float(found[1])


def answer_times(journeys: Sequence[Journey], samples: Sequence[StepSample]) -> list[float]:
    """From the end of the last step before it until a chunk was at its client, for every chunk."""
    ends = [sample.end_s for sample in samples]
    found = []
    for journey in journeys:
        for chunk_s in journey.chunks_s:
            place = bisect_right(ends, chunk_s) - 1
            if place >= 0:
                found.append(chunk_s - ends[place])
    return found
