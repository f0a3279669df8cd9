"""Figures of a replica without simulating it: a mean step in a mean-field queue. Under a millisecond.

    C decodes at once      C = rate · output · TPOT                       (Little's law)
    TPOT                   T(C) / (1 - rate · P)                          prefills take their share of every second
    P                      T(prompt and C decodes) - T(C decodes)         what a prefill adds to steps that run anyway
    capacity               C_max / (output · T(C_max) + C_max · P)        C_max: seats, or what the KV cache holds
    wait for a prefill     rate · E[P²] / (2 (1 - rate · P))              M/G/1 (Pollaczek, Khinchine)
    wait for a seat        E2E / C_max · u^(√(2 (C_max + 1)) - 1) / (1 - u)     M/M/c (Sakasegawa 1977)

For choosing what to simulate; what is promised is simulated.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from statistics import NormalDist

from powerband.cost.latency import LatencyModel
from powerband.planner.plan_request import RequestTokens
from powerband.planner.results import Bound
from powerband.spec.deployment import Replica
from powerband.spec.slo import SLO

HELD_OUTPUT = 0.6  # of an answer: what its request holds of it, on average
_ROUNDS = 12  # of bisection
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # between them, steps are on straight lines


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one replica at a rate of arrivals, each of one request or of a conversation. Seconds; *_high: at the asked
    percentile. utilization: u = rate / capacity; from 1 on, times are infinite. by_memory: whether the KV cache, not
    seats, is what bounds requests at once.
    """

    ttft_s: float
    ttft_high_s: float
    tpot_s: float
    tpot_high_s: float
    running: float
    capacity: float
    utilization: float
    wait_s: float
    by_memory: bool

    def e2e_s(self, output: float) -> float:
        return self.ttft_s + (output - 1) * self.tpot_s


class ClosedForm:
    """Of one kind of replica under one kind of requests."""

    def __init__(
        self,
        times: StepTimes,
        replica: Replica,
        kv_tokens: int,
        *,
        percentile: float,
        slowdown: float,
    ) -> None:
        weight = times.weight
        self._times, self._weight = times, weight
        self._model, self._parallel = times.model, times.model.num_stages
        self._percentile, self._slowdown = percentile, slowdown
        self._chunk = replica.long_prefill_token_threshold or replica.max_num_batched_tokens
        self._deviations = max(NormalDist().inv_cdf(min(percentile, 0.9999)), 0.0)
        by_cache = kv_tokens / (weight.prompt + weight.output * HELD_OUTPUT)
        self.seats = max(min(float(replica.max_num_seqs), by_cache), 1.0)
        self.by_memory = by_cache < replica.max_num_seqs
        self._tokens_per_step = _tokens_per_step(replica)
        self.prefill_s = self._added_s(weight.new)
        max_running = self.seats
        denominator = weight.output / self._tokens_per_step * self._step_s(max_running) + max_running * self.prefill_s
        self.capacity = max_running / denominator / weight.turns if denominator > 0 else math.inf

    @property
    def output(self) -> float:
        """Mean tokens of an answer."""
        return self._weight.output

    @property
    def output_of_arrival(self) -> float:
        """Mean tokens of all answers of a conversation."""
        return self._weight.output * self._weight.turns

    def shares(self, running: float) -> tuple[dict[str, float], Bound]:
        """Of a second's work, by operator, the largest first; and what binds most of it.

        The work: decodes of so many requests, and their prefills, in the ratio in which they come.
        """
        decodes = max(round(running / self._parallel), 1)
        prompt = max(round(self._weight.new), 1)
        decoding = [self._times.decode_work] * decodes, decodes
        prefilling = [(prompt, max(round(self._weight.prompt), prompt))], 1
        counts = max(self._weight.output / self._tokens_per_step / max(running, 1.0), 0.1), 1.0
        operators: dict[str, float] = {}
        bounds: dict[str, float] = {}
        for (works, sampled), count in zip((decoding, prefilling), counts, strict=True):
            for found, into in (
                (self._model.parts(works, sampled), operators),
                (self._model.bounds(works, sampled), bounds),
            ):
                for name, seconds in found.items():
                    into[name] = into.get(name, 0.0) + seconds * count
        whole = sum(operators.values()) or 1.0
        ordered = sorted(operators.items(), key=lambda item: -item[1])
        names: tuple[Bound, ...] = ("bandwidth", "compute", "link", "host")
        return (
            {name: seconds / whole for name, seconds in ordered if seconds > 0},
            max(names, key=lambda name: bounds.get(name, 0.0)),
        )

    def slo_rate(self, slo: SLO) -> float:
        """The highest rate at which the limits are kept at the percentile; 0: none."""
        low, high = 0.0, self.capacity
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            if self.keeps(slo, self.at(middle)):
                low = middle
            else:
                high = middle
        return low if low > self.capacity * 1e-4 else 0.0

    def keeps(self, slo: SLO, found: Estimate) -> bool:
        output = self._weight.output
        e2e_s = found.ttft_high_s + (output - 1) * found.tpot_high_s
        pairs = ((found.ttft_high_s, slo.ttft_s), (found.tpot_high_s, slo.tpot_s), (e2e_s, slo.e2e_s))
        return all(limit is None or value <= limit for value, limit in pairs)

    def at(self, rate: float) -> Estimate:
        weight = self._weight
        utilization = rate / self.capacity
        rate *= weight.turns
        prefilling = rate * self.prefill_s
        if utilization >= 1 or prefilling >= 1:
            never = math.inf
            return Estimate(never, never, never, never, self.seats, self.capacity, utilization, never, self.by_memory)
        running = self._running(rate)
        tpot_s = self._tpot_s(running, rate)
        high = min(running + self._deviations * math.sqrt(running), self.seats)
        # How many prefills come between the tokens of one answer is a matter of chance, too.
        chance_s = self.prefill_s * self._parallel * math.sqrt(rate * tpot_s / weight.output)
        tpot_high_s = self._tpot_s(high, rate) + self._deviations * chance_s
        alone_s = self._alone_s(weight.new, running)
        square = alone_s**2 * weight.new_squared / max(weight.new, 1.0) ** 2
        wait_s = rate * square / (2 * (1 - prefilling)) / self._parallel + self._step_s(running) / 2
        e2e_s = alone_s + weight.output * tpot_s
        power = math.sqrt(2 * (self.seats + 1)) - 1
        wait_s += e2e_s / self.seats * utilization**power / (1 - utilization)
        tail = math.log(max(utilization / (1 - self._percentile), 1.0)) / max(utilization, 1e-6)
        host_s = (self._model.host.arrival_s + self._model.host.answer_s) * self._slowdown
        ttft_s = host_s + alone_s + wait_s
        longer_s = self._alone_s(weight.new_high, running) - alone_s
        return Estimate(
            ttft_s=ttft_s,
            ttft_high_s=ttft_s + math.hypot(longer_s, wait_s * max(tail - 1.0, 0.0)),
            tpot_s=tpot_s,
            tpot_high_s=tpot_high_s,
            running=running,
            capacity=self.capacity,
            utilization=utilization,
            wait_s=wait_s,
            by_memory=self.by_memory,
        )

    def _running(self, rate: float) -> float:
        """The fixed point of Little's law."""
        per_second = self._tpot_s(1.0, rate) / self._step_s(1.0)  # TPOT is so many times a step
        return min(self._times.balanced(rate * self._weight.output * per_second * self._slowdown), self.seats)

    def _tpot_s(self, running: float, rate: float) -> float:
        """With stages, a chunk delays those in its own step in every stage, and those behind it once more."""
        busy = rate * self.prefill_s
        behind = 1 + busy if self._parallel > 1 else 1.0
        return self._step_s(running) / self._tokens_per_step * behind / (1 - busy)

    def _step_s(self, running: float) -> float:
        return self._times.decoding_s(running) * self._slowdown

    def _added_s(self, tokens: float) -> float:
        """What the prefill of so many tokens adds to steps of decodes, spread over the stages."""
        whole = self._times.prefilling_s(tokens, 8 * self._parallel, self._chunk)
        alone = self._times.decoding_s(8 * self._parallel) * self._times.chunks(tokens, self._chunk)
        return max(whole - alone, 0.0) / self._parallel * self._slowdown

    def _alone_s(self, tokens: float, running: float) -> float:
        return self._times.prefilling_s(tokens, running, self._chunk) * self._slowdown


class StepTimes:
    """Seconds of the usual steps of a kind of replica, its host's work included, whatever the limits of its scheduler.

    Computed where they are asked for; stages compute different requests at once.
    """

    def __init__(self, model: LatencyModel, weight: RequestTokens, draft_tokens: int = 0) -> None:
        self.model, self.weight = model, weight
        self.decode_work = 1 + draft_tokens, max(round(weight.context), 2)
        self._cached = max(round(weight.prompt - weight.new), 0)
        self._decoding: dict[int, float] = {}
        self._prefilling: dict[tuple[int, int, int], float] = {}

    def decoding_s(self, running: float) -> float:
        """A step of decodes."""
        at_once = max(running / self.model.num_stages, 1.0)
        place = min(bisect_right(_BATCHES, at_once), len(_BATCHES) - 1)
        low, high = _BATCHES[place - 1], _BATCHES[place]
        first = self._decodes_s(low)
        return first + (at_once - low) / (high - low) * (self._decodes_s(high) - first) if at_once > low else first

    def balanced(self, factor: float) -> float:
        """The requests at once that are `factor` times the seconds of a step of them; infinity: there is no end."""
        stages = self.model.num_stages
        before, before_s = float(stages), self._decodes_s(_BATCHES[0])
        if factor * before_s <= before:
            return factor * before_s
        for batch in _BATCHES[1:]:
            requests, seconds = float(batch * stages), self._decodes_s(batch)
            if factor * seconds <= requests:
                slope = (seconds - before_s) / (requests - before)
                return factor * (before_s - slope * before) / (1 - factor * slope)
            before, before_s = requests, seconds
        return math.inf

    def prefilling_s(self, tokens: float, running: float, chunk: int) -> float:
        """Steps until the first token of a prompt, beside so many decodes: on a straight line between none and some."""
        at_once = running / self.model.num_stages
        none = self._prefill_s(tokens, 0, chunk)
        return none + at_once / 64 * (self._prefill_s(tokens, 64, chunk) - none)

    def chunks(self, tokens: float, chunk: int) -> int:
        return max(math.ceil(tokens / max(chunk, 1)), 1)

    def _decodes_s(self, count: int) -> float:
        known = self._decoding.get(count)
        if known is None:
            seconds = self.model.step_s([self.decode_work] * count, count * self.decode_work[0])
            known = self._decoding[count] = self._with_host(seconds, count)
        return known

    def _prefill_s(self, tokens: float, decodes: int, chunk: int) -> float:
        chunks, total = self.chunks(tokens, chunk), max(round(tokens), 1)
        known = self._prefilling.get((total, decodes, chunks))
        if known is not None:
            return known
        start, seconds = 0, 0.0
        for number in range(chunks):
            end = total * (number + 1) // chunks
            works = [(end - start, self._cached + end), *[self.decode_work] * decodes]
            is_last = number == chunks - 1
            seconds += self._with_host(self.model.step_s(works, decodes + is_last), len(works))
            start = end
        self._prefilling[total, decodes, chunks] = seconds
        return seconds

    def _with_host(self, device_s: float, works: int) -> float:
        host = self.model.host
        host_s = host.step_s + host.per_request_s * works
        return max(device_s, host_s) if host.overlapped else device_s + host_s


def _tokens_per_step(replica: Replica) -> float:
    """Of a decode: its own token and the drafts that are accepted before the first that is not (a geometric sum)."""
    chance, drafts = replica.draft_acceptance, replica.draft_tokens
    return sum(chance**accepted for accepted in range(drafts + 1))
