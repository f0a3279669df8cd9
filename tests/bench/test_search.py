"""The search for the highest rate, on queues whose capacity is known."""

from __future__ import annotations

import asyncio
import heapq
import math
import random
from collections.abc import Callable

import pytest

from powerband.bench.client.messages import Sample
from powerband.bench.load import Live, LoadResult, steady_window
from powerband.bench.saturation import is_saturated
from powerband.bench.search import RESOLUTION, CapacityResult, Searcher, missed_slo_time_s
from powerband.bench.server_metrics import ServerMetrics
from powerband.errors import UsageError
from powerband.metrics.record import Outcome
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import OpenLoop
from powerband.spec.workload.lengths import Fixed
from powerband.spec.workload.schedule import Schedule
from powerband.spec.workload.workload import RequestMix, Workload

SERVICE_S, SLOTS = 0.5, 4  # so that it serves 8 requests a second and no more
CAPACITY = SLOTS / SERVICE_S
LIMITS = SLO(ttft_s=1.0, attainment=0.95)
LOAD = Workload(name="queue", arrivals=OpenLoop.at(1.0), requests=RequestMix(Fixed(16), Fixed(2)))


def queue(schedule: Schedule, *, lag_s: float = 0.0, refused: float = 0.0, noise: random.Random) -> list[Sample]:
    """Each request waits for a slot, has its first token a tenth of its service later, and its second at the end."""
    free = [0.0] * SLOTS
    samples = []
    for number, chain in enumerate(schedule.chains):
        sent_s = chain.start_s + lag_s
        common = {"index": number, "chain": number, "scheduled_s": chain.start_s, "sent_s": sent_s, "asked_tokens": 2}
        if noise.random() < refused:
            samples.append(Sample(**common, outcome=Outcome.REFUSED, status=429))  # type: ignore[arg-type]
            continue
        start_s = max(heapq.heappop(free), sent_s)
        heapq.heappush(free, start_s + SERVICE_S)
        times = (start_s + SERVICE_S / 10, start_s + SERVICE_S)
        samples.append(Sample(**common, chunk_times_s=times, chunk_tokens=(1, 1), output_tokens=2))  # type: ignore[arg-type]
    return samples


class Server:
    """Simulates a load. Like a real one, it asks `stop` as requests end, and ends the load when the answer is yes.

    It asks after 10 requests, and then whenever there are a tenth more: each answer reads all that have ended.
    """

    def __init__(self, *, seconds: float = 120.0, lag_s: float = 0.0, refused: float = 0.0) -> None:
        self.seconds, self.lag_s, self.refused = seconds, lag_s, refused
        self.seconds_played = 0.0
        self.noise = random.Random(0)

    async def __call__(self, rate: float, seed: int, stop: Callable[[Live], bool] | None) -> LoadResult:
        workload = Workload(name="queue", arrivals=OpenLoop.at(rate), requests=LOAD.requests)
        schedule = workload.draw(seed, duration_s=self.seconds)
        samples = queue(schedule, lag_s=self.lag_s, refused=self.refused, noise=self.noise)
        stopped, seen = False, samples
        if stop is not None:
            ordered = sorted(samples, key=lambda s: s.chunk_times_s[-1] if s.chunk_times_s else s.sent_s)
            count = 10
            while count < len(ordered):
                if stop(Live(schedule, samples=ordered[:count])):
                    stopped, seen = True, ordered[:count]
                    break
                count += max(10, count // 10)
        wall_s = max(s.chunk_times_s[-1] if s.chunk_times_s else s.sent_s for s in seen)
        self.seconds_played += wall_s
        return LoadResult(
            schedule=schedule,
            samples=tuple(sorted(seen, key=lambda s: s.index)),
            server=ServerMetrics(),
            wall_s=wall_s,
            client_share=0.1,
            chunks_per_s=1.0,
            unsent=0,
            stopped=stopped,
        )


def searcher(server: Server, slo: SLO = LIMITS) -> Searcher:
    return Searcher(server, slo, seed=0, warm_up=0.1, cool_down=0.05, shown=lambda _: None)


def find(server: Server, first: float, slo: SLO = LIMITS) -> CapacityResult:
    return asyncio.run(searcher(server, slo).find_rate(first))


@pytest.mark.parametrize("first", [0.5, 6.0, 100.0])
def test_the_highest_rate_is_found_from_wherever_it_begins(first: float) -> None:
    server = Server(seconds=300.0)
    found = find(server, first)
    assert 0.7 * CAPACITY < found.rate < CAPACITY  # a queue of exponential gaps keeps the SLO to nearly its capacity
    assert found.interval[0] <= found.rate <= found.interval[1]
    assert found.attainment >= LIMITS.attainment
    beyond = [trial for trial in found.trials if trial.rate > found.rate * RESOLUTION * 1.001]
    assert beyond
    assert all(trial.verdict != "met" for trial in beyond)


def test_a_load_that_is_lost_is_given_up_early() -> None:
    found = find(Server(seconds=300.0), 100.0)
    stopped = [trial for trial in found.trials if trial.result.stopped]
    assert stopped
    assert all(
        len(trial.result.samples) < trial.result.schedule.num_requests / 2 for trial in stopped if trial.rate > 30
    )


def test_a_server_that_refuses_a_tenth_keeps_the_slo_at_no_rate() -> None:
    found = find(Server(refused=0.1), 4.0)
    assert found.rate == 0
    assert all(trial.verdict == "missed" for trial in found.trials)


def test_a_rate_that_was_met_by_luck_is_not_named() -> None:
    """With the first seed nothing is refused, with every other a fifth is."""

    class Lucky(Server):
        async def __call__(self, rate: float, seed: int, stop: Callable[[Live], bool] | None) -> LoadResult:
            self.refused = 0.2 if seed else 0.0
            return await super().__call__(rate, seed, stop)

    found = find(Lucky(), 4.0)
    assert any(trial.verdict == "met" for trial in found.trials)
    assert found.rate == 0


def test_a_load_of_too_few_requests_is_not_judged() -> None:
    with pytest.raises(UsageError, match="too few to judge") as caught:
        find(Server(seconds=10.0), 2.0)
    assert caught.value.hint == "Make loads longer: --duration 20s."


def test_a_client_that_cannot_follow_ends_the_search() -> None:
    with pytest.raises(UsageError, match="cannot drive 4 requests"):
        find(Server(lag_s=0.5), 4.0)


def test_a_search_needs_a_limit() -> None:
    with pytest.raises(UsageError, match="only be found for an SLO"):
        searcher(Server(), SLO())


@pytest.mark.parametrize(("rate", "expected"), [(2.0, False), (6.0, False), (10.0, True)])
def test_saturation_is_a_queue_that_grows(rate: float, expected: bool) -> None:
    workload = Workload(name="queue", arrivals=OpenLoop.at(rate), requests=LOAD.requests)
    for seed in range(10):
        samples = queue(workload.draw(seed, duration_s=60.0), noise=random.Random(0))
        assert is_saturated([s.record() for s in samples], steady_window(samples, 0.1, 0.05)) is expected


def test_giving_up_wrongly_is_rare() -> None:
    """Just as many miss as may: it may give up in at most one of a hundred loads (Ville), however long they run."""
    generator = random.Random(5)
    given_up = 0
    for _ in range(200):
        samples = [_sample(generator.random() < 0.05) for _ in range(400)]
        given_up += any(missed_slo_time_s(samples[:count], LIMITS) >= math.log(100) for count in range(40, 401, 40))
    assert given_up <= 6  # 2 expected at most; more than 6 has a probability below 1 in 100
    late = [_sample(generator.random() < 0.3) for _ in range(100)]
    assert missed_slo_time_s(late, LIMITS) >= math.log(100)


def _sample(misses: bool) -> Sample:
    outcome = Outcome.ERROR if misses else Outcome.OK
    return Sample(
        index=0, chain=0, scheduled_s=0.0, sent_s=0.0, chunk_times_s=(0.1,), chunk_tokens=(1,), outcome=outcome
    )
