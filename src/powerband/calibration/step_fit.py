"""From measured steps of one model to its StepTimeModel.

Everything is linear in coefficients that are not negative, so that the fit has one answer, more work never takes less
time, and a minute of steps is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from powerband.calibration.curve_fit import FitErrors, Vector, non_negative
from powerband.cost.measured_steps import MeasuredStepTimes
from powerband.cost.step_log import StepSample
from powerband.errors import UsageError
from powerband.spec.hardware.profile import StepTimeModel

TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
ROWS = (1, 4, 16, 64, 256)
POSITIONS = (0, 2048, 8192, 32768, 131072)
SCALE = 0.03  # relative: what lies further off counts less
_MIN_STEPS = 8
_MIN_AT_REST = 3


def fit_steps(samples: Sequence[StepSample]) -> StepTimeModel:
    """Raises UsageError for too few samples."""
    _check_count(len(samples))
    tokens, rows = all_knots(samples)
    seconds = np.array([sample.seconds for sample in samples])
    matrix = np.array([features(sample, tokens, rows) for sample in samples]) / seconds[:, None]
    return step_time_model(non_negative(matrix, np.ones(len(samples)), scale=SCALE), tokens, rows)


def _check_count(count: int) -> None:
    if count < _MIN_STEPS:
        raise UsageError(f"{count} steps are too few to fit a law to.", hint="Let the engine work for longer.")


def all_knots(samples: Sequence[StepSample]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of tokens and of sampled rows."""
    tokens = _knots(TOKENS, [sample.num_tokens for sample in samples])
    return tokens, _knots(ROWS, [sample.sampled for sample in samples])


def step_time_model(found: Vector, tokens: tuple[int, ...], rows: tuple[int, ...]) -> StepTimeModel:
    """From coefficients in the order of `features`."""
    num_tokens, num_rows = len(tokens), len(rows)
    after = num_tokens + num_rows
    decode_s, chunk_s, pair_s, read_s = map(float, found[after + len(POSITIONS) :])
    return StepTimeModel(
        tokens=tokens,
        token_s=_rising(found[:num_tokens]),
        rows=rows,
        row_s=_rising(found[num_tokens : num_tokens + num_rows]),
        positions=POSITIONS,
        position_s=_rising(found[after : after + len(POSITIONS)]),
        decode_s=decode_s,
        chunk_s=chunk_s,
        pair_s=pair_s,
        read_s=read_s,
    )


def held_out_error(samples: Sequence[StepSample], folds: int = 4) -> FitErrors:
    """Of laws that were fitted without the steps that they are asked about."""
    predicted, measured = [], []
    for fold in range(folds):
        step_model = MeasuredStepTimes(fit_steps([s for i, s in enumerate(samples) if i % folds != fold]))
        for sample in samples[fold::folds]:
            predicted.append(step_model.step_s(sample.works, sample.sampled))
            measured.append(sample.seconds)
    return FitErrors.from_values(predicted, measured)


def _knots(places: Sequence[int], seen: Sequence[int]) -> tuple[int, ...]:
    """Those places between which something was seen, the first and one beyond the last among them."""
    found = {places[0]}
    for value in seen:
        if value <= 0:
            continue
        above = next((place for place in places if place >= value), places[-1])
        found.add(above)
    return tuple(sorted(found))


def features(sample: StepSample, tokens: Sequence[int], rows: Sequence[int]) -> list[float]:
    """What the coefficients of a law are multiplied with."""
    decodes = [context for new, context in sample.works if new == 1]
    chunks = [(new, context) for new, context in sample.works if new > 1]
    return [
        *_ramps(tokens, sample.num_tokens),
        *(_ramps(rows, sample.sampled) if sample.sampled else [0.0] * len(rows)),
        *(_ramps(POSITIONS, sum(decodes)) if decodes else [0.0] * len(POSITIONS)),
        float(len(decodes)),
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


def _rising(increments: Vector) -> tuple[float, ...]:
    return tuple(float(value) for value in np.cumsum(increments))
