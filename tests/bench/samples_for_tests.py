"""Runs that no server was asked for: a schedule played against a queue with so many slots, and reports made of it."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import replace

from powerband.bench.client.messages import Sample
from powerband.bench.client.probe import ServerInfo
from powerband.bench.load import LoadResult
from powerband.bench.report.results import ClientMachine, OfferedLoad, Point, ReportedAddress, RunReport, build_point
from powerband.bench.server_metrics import ServerMetrics
from powerband.metrics.record import Outcome
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import Arrivals, OpenLoop
from powerband.spec.workload.lengths import LogNormal
from powerband.spec.workload.schedule import PlannedRequest, Schedule
from powerband.spec.workload.workload import RequestMix, SharedPrefix, Workload

LIMITS = SLO(ttft_s=0.5, tpot_s=0.05, attainment=0.95)
MIX = RequestMix(LogNormal(median=300, sigma=0.8, high=4096), LogNormal(median=60, sigma=0.6, high=256))
SLOTS = 48


def workload(rate: float = 6.0, mix: RequestMix = MIX, arrivals: Arrivals | None = None) -> Workload:
    return Workload(name="chat", arrivals=arrivals or OpenLoop.at(rate), requests=mix)


def shared(mix: RequestMix = MIX) -> RequestMix:
    return replace(mix, prefix=SharedPrefix(LogNormal(median=200, sigma=0.1), groups=4))


def played(
    schedule: Schedule, *, slowness: float = 1.0, lag_s: float = 0.0003, failures: float = 0.0, noise_seed: int = 1
) -> LoadResult:
    """Each request waits for one of SLOTS, is prefilled, and decodes the slower the more run beside it. slowness: of
    the server; lag_s: mean of the client's; failures: share of requests refused, broken or timed out.
    """
    generator = random.Random(noise_seed)
    ends: list[float] = []
    samples: list[Sample] = []
    for number, chain in enumerate(schedule.chains):
        due_s = chain.start_s
        for request in chain.requests:
            due_s += request.think_s
            sample = _answered(request, number, due_s, ends, slowness, lag_s, failures, generator)
            samples.append(sample)
            due_s = sample.chunk_times_s[-1] if sample.chunk_times_s else due_s
    wall_s = max((s.chunk_times_s[-1] for s in samples if s.chunk_times_s), default=1.0)
    chunks = sum(len(sample.chunk_times_s) for sample in samples)
    return LoadResult(
        schedule=schedule,
        samples=tuple(sorted(samples, key=lambda sample: sample.index)),
        server=_metrics(samples, wall_s),
        wall_s=wall_s,
        client_share=0.07,
        chunks_per_s=chunks / wall_s,
        unsent=0,
        stopped=False,
    )


def load(rate: float = 6.0, requests: int = 300, seed: int = 0, **how: float) -> LoadResult:
    return played(workload(rate).draw(seed, num_requests=requests), **how)  # type: ignore[arg-type] # numbers


def point(
    result: LoadResult | None = None, rate: float = 6.0, slo: SLO | None = LIMITS, **more: float | bool | None
) -> Point:
    result = result or load(rate)
    offered = OfferedLoad("rate", rate)
    return build_point(
        result,
        label=f"{rate:g}/s",
        offered=offered,
        warm_up=0.1,
        cool_down=0.05,
        slo=slo,
        **more,  # type: ignore[arg-type]
    )


def report(*points: Point, rate: float = 6.0, slo: SLO | None = LIMITS) -> RunReport:
    made = points or (point(rate=rate, slo=slo),)
    return RunReport(
        started_at="2026-05-04T10:20:30Z",
        command=("powerband", "bench", "http://127.0.0.1:8000", "--rate", f"{rate:g}"),
        powerband="0.1.0",
        machine=ClientMachine("A processor", 2, "Linux 6.1, Python 3.11.7"),
        target=ReportedAddress("http://127.0.0.1:8000", "completions", "demo"),
        server=ServerInfo("powerband", "0.1.0", 4096),
        workload=workload(rate).as_dict(),
        slo=slo,
        seed=0,
        warm_up=0.1,
        cool_down=0.05,
        points=made,
    )


def _answered(
    request: PlannedRequest,
    chain: int,
    due_s: float,
    ends: list[float],
    slowness: float,
    lag_s: float,
    failures: float,
    generator: random.Random,
) -> Sample:
    sent_s = due_s + generator.expovariate(1 / lag_s)
    sample = Sample(
        index=request.index,
        chain=chain,
        turn=request.turn,
        scheduled_s=due_s,
        sent_s=sent_s,
        asked_tokens=request.output_tokens,
        status=200,
    )
    if generator.random() < failures:
        return _failed(sample, generator)
    while ends and ends[0] <= sent_s:
        heapq.heappop(ends)
    start_s = heapq.heappop(ends) if len(ends) >= SLOTS else sent_s
    now_s = start_s + (0.02 + request.new_tokens / 9000 * generator.lognormvariate(0, 0.3)) * slowness
    times = [now_s]
    step_s = (0.012 + 0.0006 * len(ends)) * slowness
    for _ in range(request.output_tokens - 1):
        now_s += step_s * generator.lognormvariate(0, 0.15) + (0.15 if generator.random() < 0.001 else 0.0)
        times.append(now_s)
    heapq.heappush(ends, now_s)
    return Sample(
        **{name: getattr(sample, name) for name in ("index", "chain", "turn", "scheduled_s", "sent_s", "asked_tokens")},
        status=200,
        chunk_times_s=tuple(times),
        chunk_tokens=(1,) * len(times),
        finish_reason="length",
        prompt_tokens=request.new_tokens,
        output_tokens=len(times),
        cached_tokens=request.new_tokens // 4,
    )


def _failed(sample: Sample, generator: random.Random) -> Sample:
    names = ("index", "chain", "turn", "scheduled_s", "sent_s", "asked_tokens")
    kept = {name: getattr(sample, name) for name in names}
    ways = (
        (Outcome.REFUSED, 429, f"the queue is full: {generator.randrange(900)} requests wait"),
        (Outcome.ERROR, 0, "no connection: [Errno 104] Connection reset by peer"),
        (Outcome.TIMED_OUT, 0, "not answered within 600 s"),
    )
    outcome, status, error = generator.choice(ways)
    return Sample(**kept, outcome=outcome, status=status, error=error)


def _metrics(samples: list[Sample], wall_s: float) -> ServerMetrics:
    metrics = ServerMetrics()
    spans = [(s.sent_s, s.chunk_times_s[0], s.chunk_times_s[-1], s.output_tokens) for s in samples if s.chunk_times_s]
    for second in range(math.ceil(wall_s) + 1):
        waiting = sum(sent <= second < first for sent, first, _, _ in spans)
        running = sum(first <= second < end for _, first, end, _ in spans)
        done = [(sent, first, tokens) for sent, first, end, tokens in spans if end <= second]
        seen = {
            "running": float(running),
            "waiting": float(waiting),
            "kv_usage": min((running + waiting) / 60, 1.0),
            "preemptions": 0.0,
            "prefix_queries": 400.0 * len(done),
            "prefix_hits": 100.0 * len(done),
            "ttft_count": float(len(done)),
            "ttft_sum": sum(first - sent for sent, first, _ in done),
            "queue_count": float(len(done)),
            "queue_sum": 0.004 * len(done),
        }
        metrics.add(float(second), seen)
    return metrics
