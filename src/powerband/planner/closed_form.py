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
from dataclasses import dataclass

from powerband.cost.latency import LatencyModel
from powerband.planner.outcome import Bound
from powerband.planner.question import Weight
from powerband.spec.deployment import Replica
from powerband.spec.slo import SLO

_ROUNDS = 20  # of bisection


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one replica at a rate. Seconds; *_high: at the asked percentile. utilization: u = rate / capacity; from 1 on,
    times are infinite. by_memory: whether the KV cache, not seats, is what bounds requests at once.
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
        model: LatencyModel,
        replica: Replica,
        kv_tokens: int,
        weight: Weight,
        *,
        percentile: float,
        slowdown: float,
    ) -> None:
        self._model, self._replica, self._weight = model, replica, weight
        self._percentile, self._slowdown = percentile, slowdown
        by_cache = kv_tokens / (weight.prompt + weight.output * 0.6)
        self.seats = max(min(float(replica.max_num_seqs), by_cache), 1.0)
        self.by_memory = by_cache < replica.max_num_seqs
        self._steps: dict[int, float] = {}
        # What stages compute at once divides the time between steps of one request's tokens among all requests.
        self._parallel = model.num_stages
        self._tokens_per_step = _tokens_per_step(replica)
        self.prefill_s = self._added_s(weight.new)
        most = self.seats
        denominator = weight.output / self._tokens_per_step * self._step_s(most) + most * self.prefill_s
        self.capacity = most / denominator if denominator > 0 else math.inf

    @property
    def output(self) -> float:
        """Mean tokens of an answer."""
        return self._weight.output

    def operators(self, running: float) -> dict[str, float]:
        """Shares of a second's work by operator: decodes of so many requests, and their share of prefills."""
        return _shares([self._model.parts(*shape) for shape in self._usual_steps(running)])

    def bound(self, running: float) -> Bound:
        """What most of that time is bound by."""
        shares = _shares([self._model.bounds(*shape) for shape in self._usual_steps(running)])
        names: tuple[Bound, ...] = ("bandwidth", "compute", "link", "host")
        return max(names, key=lambda name: shares.get(name, 0.0))

    def _usual_steps(self, running: float) -> list[tuple[list[tuple[int, int]], int]]:
        """Steps of one answer's decodes, as many as they are, and of one prompt; in the ratio in which they come."""
        decodes = max(round(running / self._parallel), 1)
        prompt = max(round(self._weight.new), 1)
        steps = max(round(self._weight.output / max(running, 1.0)), 1)
        decoding: tuple[list[tuple[int, int]], int] = ([self._decode] * decodes, decodes)
        return [decoding] * min(steps, 64) + [([(prompt, max(round(self._weight.prompt), prompt))], 1)]

    def kept_rate(self, slo: SLO) -> float:
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
        prefilling = rate * self.prefill_s
        if utilization >= 1 or prefilling >= 1:
            never = math.inf
            return Estimate(never, never, never, never, self.seats, self.capacity, utilization, never, self.by_memory)
        running = self._running(rate)
        tpot_s = self._tpot_s(running, rate)
        high = min(running + _normal(self._percentile) * math.sqrt(running), self.seats)
        tpot_high_s = self._tpot_s(high, rate) if weight.output < 8 else 0.5 * (self._tpot_s(high, rate) + tpot_s)
        alone_s = self._alone_s(weight.new, running)
        square = self.prefill_s**2 * weight.new_squared / max(weight.new, 1.0) ** 2
        wait_s = rate * square / (2 * (1 - prefilling)) + self._step_s(running) / 2
        e2e_s = alone_s + weight.output * tpot_s
        power = math.sqrt(2 * (self.seats + 1)) - 1
        wait_s += e2e_s / self.seats * utilization**power / (1 - utilization)
        tail = math.log(max(utilization / (1 - self._percentile), 1.0)) / max(utilization, 1e-6)
        host_s = (self._model.host.arrival_s + self._model.host.answer_s) * self._slowdown
        return Estimate(
            ttft_s=host_s + alone_s + wait_s,
            ttft_high_s=host_s + self._alone_s(weight.new_high, running) + wait_s * max(tail, 1.0),
            tpot_s=tpot_s,
            tpot_high_s=tpot_high_s,
            running=running,
            capacity=self.capacity,
            utilization=utilization,
            wait_s=wait_s,
            by_memory=self.by_memory,
        )

    def _running(self, rate: float) -> float:
        """The fixed point of Little's law, by bisection: the right side grows slower than the left at the end."""
        low, high = 0.0, self.seats
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            if rate * self._weight.output * self._tpot_s(middle, rate) > middle:
                low = middle
            else:
                high = middle
        return high

    def _tpot_s(self, running: float, rate: float) -> float:
        return self._step_s(running) / self._tokens_per_step / (1 - rate * self.prefill_s)

    def _step_s(self, running: float) -> float:
        """A step of decodes, between whole numbers on a straight line."""
        below = max(math.floor(running), 1)
        share = max(running - below, 0.0)
        first = self._whole_step_s(below)
        return first if share == 0 else first + share * (self._whole_step_s(below + 1) - first)

    def _whole_step_s(self, decodes: int) -> float:
        known = self._steps.get(decodes)
        if known is None:
            stages = self._parallel
            at_once = -(-decodes // stages)
            work = (1 + self._replica.draft_tokens, max(round(self._weight.context), 2))
            seconds = self._model.step_s([work] * at_once, at_once * work[0])
            known = self._steps[decodes] = self._with_host(seconds, at_once)
        return known

    def _added_s(self, tokens: float) -> float:
        """What the prefill of so many tokens adds to steps of decodes, spread over the stages."""
        whole, alone = self._prefill_s(tokens, 8), self._with_host(self._model.step_s([self._decode] * 8, 8), 8)
        return max(whole - alone * self._chunks(tokens), 0.0) / self._parallel

    def _alone_s(self, tokens: float, running: float) -> float:
        return self._prefill_s(tokens, max(round(running / self._parallel), 0))

    def _prefill_s(self, tokens: float, decodes: int) -> float:
        """Steps until the first token of a prompt, beside so many decodes."""
        chunks, start, seconds = self._chunks(tokens), 0, 0.0
        total = max(round(tokens), 1)
        cached = max(round(self._weight.prompt - self._weight.new), 0)
        for number in range(chunks):
            end = total * (number + 1) // chunks
            works = [(end - start, cached + end), *[self._decode] * decodes]
            is_last = number == chunks - 1
            seconds += self._with_host(self._model.step_s(works, decodes + is_last), len(works))
            start = end
        return seconds

    @property
    def _decode(self) -> tuple[int, int]:
        return 1, max(round(self._weight.context), 2)

    def _chunks(self, tokens: float) -> int:
        replica = self._replica
        budget = replica.long_prefill_token_threshold or replica.max_num_batched_tokens
        return max(math.ceil(tokens / max(budget, 1)), 1)

    def _with_host(self, device_s: float, works: int) -> float:
        host = self._model.host
        host_s = host.step_s + host.per_request_s * works
        whole = max(device_s, host_s) if host.overlapped else device_s + host_s
        return whole * self._slowdown


def _shares(steps: list[dict[str, float]]) -> dict[str, float]:
    """Of the seconds of all steps, the largest first."""
    seconds: dict[str, float] = {}
    for step in steps:
        for name, value in step.items():
            seconds[name] = seconds.get(name, 0.0) + value
    whole = sum(seconds.values()) or 1.0
    return {name: value / whole for name, value in sorted(seconds.items(), key=lambda item: -item[1]) if value > 0}


def _tokens_per_step(replica: Replica) -> float:
    """Of a decode: its own token and the drafts that are accepted before the first that is not (a geometric sum)."""
    chance, drafts = replica.draft_acceptance, replica.draft_tokens
    return sum(chance**accepted for accepted in range(drafts + 1))


def _normal(percentile: float) -> float:
    """The standard normal's, from the table for the usual ones."""
    from statistics import NormalDist

    return max(NormalDist().inv_cdf(min(percentile, 0.9999)), 0.0)
