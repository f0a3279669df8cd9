"""From an engine under load to what its host adds: to each step, and on the way to its clients.

The steps themselves are fitted once more with what they took under load: beside a server and its clients, which want
the same processor, they take longer than alone.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from powerband.calibration.curve_fit import non_negative
from powerband.calibration.step_fit import SCALE, all_knots, features, fit_steps, step_time_model
from powerband.cost.measured_steps import MeasuredStepTimes
from powerband.cost.step_log import StepSample
from powerband.errors import UsageError
from powerband.spec.hardware.profile import StepTimeModel

_MIN_TIMINGS = 8
_MIN_AT_REST = 3
_MAX_TIMINGS = 3000  # cycles that are fitted, equally spaced
_WINDOW_S = 1.0
_HOST_FEATURES = 4
_SPREAD = 40  # parts
_MAX_SLOWDOWN = 8.0  # times as long: what took longer was somebody else's doing


@dataclass(frozen=True, slots=True)
class EngineStepTiming:
    """From a step's end to the next one's, without a pause between them."""

    seconds: float
    step: StepSample
    new: int  # requests that begin in this step
    coming: int  # requests that begin in the next step

    @property
    def requests(self) -> int:
        return len(self.step.works)


@dataclass(frozen=True, slots=True)
class HostOverhead:
    """Seconds of a cycle beyond the step's own: step_s + per_request_s · requests + per_new_s · new ones."""

    step_s: float
    per_request_s: float
    per_new_s: float

    def of(self, timing: EngineStepTiming) -> float:
        return self.step_s + self.per_request_s * timing.requests + self.per_new_s * timing.new


def busy_timings(samples: Sequence[StepSample]) -> list[EngineStepTiming]:
    """Of steps that go on with a request of the one before: the engine had no rest between."""
    return [
        EngineStepTiming(sample.end_s - before.end_s, sample, _num_new(sample), _num_new(after))
        for before, sample, after in zip(samples, samples[1:], [*samples[2:], samples[-1]], strict=False)
        if not {context for _, context in before.works}.isdisjoint(context - new for new, context in sample.works)
    ]


def _num_new(sample: StepSample) -> int:
    return sum(new > 1 for new, _ in sample.works)


def fit_under_load(
    alone: Sequence[StepSample], timings: Sequence[EngineStepTiming]
) -> tuple[StepTimeModel, HostOverhead]:
    """The law of steps as they are under load, and the host's share.

    alone: steps of the same model without a load, which cover what the load did not; they count as much, slowed by as
    much as the load slows those that it has. Raises UsageError for too few of either.
    """
    if len(timings) < _MIN_TIMINGS:
        raise UsageError(f"{len(timings)} steps without a pause are too few.", hint="Load the engine for longer.")
    some = list(timings[:: -(-len(timings) // _MAX_TIMINGS)])
    slowdown = _slowdown(fit_steps(alone), some)
    slowed = [replace(sample, seconds=sample.seconds * slowdown) for sample in alone]
    tokens, rows = all_knots([*slowed, *(timing.step for timing in some)])
    none = [0.0] * _HOST_FEATURES
    table = [[*features(sample, tokens, rows), *none] for sample in slowed]
    table += [[*features(timing.step, tokens, rows), *_host_features(timing)] for timing in some]
    seconds = np.array([*(sample.seconds for sample in slowed), *(timing.seconds for timing in some)])
    weights = np.array([len(slowed) ** -0.5] * len(slowed) + [len(some) ** -0.5] * len(some)) * len(seconds) ** 0.5
    matrix = np.array(table) / seconds[:, None]
    found = non_negative(matrix * weights[:, None], weights, scale=SCALE)
    step_s, per_request_s, new_s, coming_s = (float(value) for value in found[-_HOST_FEATURES:])
    # The work for a request that arrives is done while the step before its first one runs, too.
    host = HostOverhead(step_s, per_request_s, new_s + coming_s)
    step_model = step_time_model(found[:-_HOST_FEATURES], tokens, rows)
    decodes, chunks = ([c for c in timings if bool(c.new) == has_new] for has_new in (False, True))
    return replace(
        step_model,
        decode_spread_s=_spread_s(decodes, step_model, host),
        chunk_spread_s=_spread_s(chunks, step_model, host),
    ), host


def _spread_s(timings: Sequence[EngineStepTiming], step_model: StepTimeModel, host: HostOverhead) -> tuple[float, ...]:
    """Measured seconds beyond the fitted ones: means of equally many, in order. None below 0: a step takes its time."""
    model = MeasuredStepTimes(step_model)
    longer = []
    for timing in timings:
        fitted = model.step_s(timing.step.works, timing.step.sampled) + host.of(timing)
        if timing.seconds < _MAX_SLOWDOWN * fitted:
            longer.append(timing.seconds - fitted)
    count = min(len(longer) // 2, _SPREAD)
    if not count:
        return ()
    means = [float(part.mean()) for part in np.array_split(np.sort(longer), count)]
    return _above_zero(means)


def _above_zero(means: Sequence[float]) -> tuple[float, ...]:
    """With the same sum, as far as that is above 0, and none below it."""
    debt, found = 0.0, []
    for mean in means:
        debt += mean
        found.append(max(debt, 0.0))
        debt = min(debt, 0.0)
    return tuple(found)


def window_errors(timings: Sequence[EngineStepTiming], step_model: StepTimeModel, host: HostOverhead) -> list[float]:
    """|predicted / measured − 1| of about each second of steps: what does not average out."""
    model = MeasuredStepTimes(step_model)
    errors, measured, predicted = [], 0.0, 0.0
    for timing in timings:
        expected = model.mean_s(timing.step.works, timing.step.sampled) + host.of(timing)
        if timing.seconds < _MAX_SLOWDOWN * expected:
            measured += timing.seconds
            predicted += expected
        if measured > _WINDOW_S:
            errors.append(abs(predicted / measured - 1))
            measured = predicted = 0.0
    return errors


def _slowdown(step_model: StepTimeModel, timings: Sequence[EngineStepTiming]) -> float:
    """How much longer steps take under load, at least 1, beside what the host adds to each."""
    model = MeasuredStepTimes(step_model)
    alone = np.array([model.step_s(timing.step.works, timing.step.sampled) for timing in timings])
    seconds = np.array([timing.seconds for timing in timings])
    matrix = np.column_stack([alone, [_host_features(timing) for timing in timings]])
    found = non_negative(matrix / seconds[:, None], (seconds - alone) / seconds, scale=0.1)
    return 1 + float(found[0])


def _host_features(timing: EngineStepTiming) -> list[float]:
    return [1.0, float(timing.requests), float(timing.new), float(timing.coming)]


@dataclass(frozen=True, slots=True)
class ClientPathTiming:
    """A request as its client saw it. Times on the clock of the engine's log."""

    sent_s: float  # when it was due
    chunks_s: tuple[float, ...]
    prompt_tokens: int


def fit_arrival_delay(
    path_timings: Sequence[ClientPathTiming], samples: Sequence[StepSample], step_s: float
) -> tuple[float, float]:
    """(seconds, seconds per prompt token) from sending until the engine knows it, of requests that found it at rest.

    step_s: the host's own, which lies between. Raises UsageError where there was none.
    """
    starts = [sample.at_s for sample in samples]
    prompts, seconds = [], []
    for path_timing in path_timings:
        place = bisect_left(starts, path_timing.sent_s)
        at_rest = 0 < place < len(samples) and samples[place - 1].end_s < path_timing.sent_s
        if at_rest and starts[place] < path_timing.chunks_s[0]:
            prompts.append(float(path_timing.prompt_tokens))
            seconds.append(max(starts[place] - path_timing.sent_s - step_s, 1e-6))
    if len(seconds) < _MIN_AT_REST:
        raise UsageError(f"{len(seconds)} requests found the engine at rest; that is too few.", hint="Load it longer.")
    wanted = np.array(seconds)
    matrix = np.stack([np.ones(len(prompts)), np.array(prompts)], axis=1)
    found = non_negative(matrix / wanted[:, None], np.ones(len(wanted)), scale=0.1)
    return float(found[0]), float(found[1])


def fit_response_delay(path_timings: Sequence[ClientPathTiming], samples: Sequence[StepSample]) -> tuple[float, float]:
    """(seconds, seconds per request in the step) from a step's end until the first token of a request that it began is
    at its client. Raises UsageError for too few requests.
    """
    times, requests = [], []
    starts = [sample.at_s for sample in samples]
    for path_timing in path_timings:
        for sample in samples[bisect_left(starts, path_timing.sent_s) : bisect_right(starts, path_timing.chunks_s[0])]:
            # A prompt's last chunk sees all of it; by its length it is told from others that begin at the same time.
            if any(new > 1 and context == path_timing.prompt_tokens for new, context in sample.works):
                times.append(max(path_timing.chunks_s[0] - sample.end_s, 1e-6))
                requests.append(float(len(sample.works)))
                break
    if len(times) < _MIN_AT_REST:
        raise UsageError(f"{len(times)} requests were answered; that is too few.", hint="Load it longer.")
    wanted = np.array(times)
    matrix = np.column_stack([np.ones(len(times)), np.array(requests)])
    scale = np.array([float(np.median(wanted))] * len(wanted))
    found = non_negative(matrix / scale[:, None], wanted / scale, scale=0.5)
    return float(found[0]), float(found[1])
