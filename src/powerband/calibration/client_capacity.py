"""What this client can do on this machine, measured against a server that does nothing: the ceiling of every load.

A report that says how near the client was to its ceiling says whether it measured the server or itself.

Chunks: streams of one token every 10 ms, each by itself as a server decodes. Level by level there are more of them,
until the client notes chunks or sends requests more than 5 ms late, has used up a core, or the server is the one that
is late. Requests: of one token each, by 32 users who do not wait.
"""

from __future__ import annotations

import hashlib
import math
import platform
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

import powerband
from powerband.bench.client.messages import RequestMessage, Sample, SegmentMessage, ServerAddress
from powerband.bench.client.prompts import ConversationPrompts, PromptMaker
from powerband.bench.load import Live, LoadOptions, run_load
from powerband.errors import EnvironmentFault
from powerband.files import write_atomically
from powerband.folders import cache_directory
from powerband.metrics.record import Outcome, percentile
from powerband.mock_server.behavior import Behavior, ServerRecord
from powerband.mock_server.process import mock_server_process
from powerband.mock_server.server import body_digest
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.workload.arrivals import ClosedLoop, OpenLoop, RatePhase
from powerband.spec.workload.lengths import Fixed
from powerband.spec.workload.schedule import Schedule
from powerband.spec.workload.workload import RequestMix, Workload

MAX_LATE_S = 0.005
_GAP_S, _TOKENS = 0.010, 100
_FULL_CORE = 0.97
_PROMPT = Fixed(16)
_USERS = 32

Limit = Literal["client", "server", "levels"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientCapacity:
    """What one worker process on one core can send and receive."""

    chunks_per_s: float  # if the client was not the limit: from its CPU time per chunk
    requests_per_s: float
    cpu_us_per_chunk: float
    limited_by: Limit  # what could not sustain the next step; 'levels': nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class RateStep:
    """The second half of a level, when as many streams end as begin. Lateness: 99th percentiles, in seconds."""

    seconds: float
    chunks: int
    cpu_s: float  # of the client
    client_late_s: float  # from a chunk's writing to its noting, and from a request's time to its sending
    server_late_s: float  # from when a chunk was due to its writing

    @property
    def limit(self) -> Limit | None:
        """Who could not follow; None: both could."""
        if self.cpu_s / self.seconds >= _FULL_CORE or self.client_late_s > max(MAX_LATE_S, self.server_late_s):
            return "client"
        return "server" if max(self.server_late_s, self.client_late_s) > MAX_LATE_S else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RateRamp:
    """How the levels rise. A level lasts at least twice as long as one of its streams: a second."""

    max_streams: int = 960
    levels: int = 8
    level_s: float = 2.0

    def schedule(self) -> Schedule:
        rates = [self.max_streams * (level + 1) / self.levels / (_TOKENS * _GAP_S) for level in range(self.levels)]
        arrivals = OpenLoop(tuple(RatePhase(rate, rate, self.level_s) for rate in rates), math.inf)
        workload = Workload(name="climb", arrivals=arrivals, requests=RequestMix(_PROMPT, Fixed(_TOKENS)))
        return workload.draw(0, duration_s=self.levels * self.level_s)


async def measure_client_capacity(climb: RateRamp | None = None, *, requests_s: float = 3.0) -> ClientCapacity:
    """Measure (about 20 s, best on an idle machine) and keep the result for `known_client_capacity`.

    Raises EnvironmentFault when a process cannot be started, or when the client is late even at the first level.
    """
    found = judge(await measure_rate_steps(climb or RateRamp()), await _requests(requests_s))
    path = _capacity_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, msgspec.json.encode(found))
    return found


def known_client_capacity() -> ClientCapacity | None:
    """What `measure_client_capacity` found last, with this processor, Python and version of powerband; None: never."""
    try:
        return msgspec.json.decode(_capacity_path().read_bytes(), type=ClientCapacity)
    except (OSError, ValueError, RecursionError):
        return None


def judge(levels: Sequence[RateStep], requests_per_s: float) -> ClientCapacity:
    """From levels that rise to what the client can do: the last that was kept up with counts. One level at which
    one side was late does not end the ramp if both sustain the next one: another process was the cause.

    Raises EnvironmentFault where none was.
    """
    limits = [level.limit for level in levels]
    failed = next((n for n, limit in enumerate(limits) if limit and all(limits[n : n + 2])), len(levels))
    limited_by = (limits[failed] if failed < len(levels) else None) or "levels"
    best = next((level for level in reversed(levels[:failed]) if level.limit is None), None)
    if best is None or not best.chunks or best.cpu_s <= 0:
        raise EnvironmentFault(
            "The load generator is late even under little load.", hint="Is this machine busy? Try again when it is not."
        )
    chunks_per_s = best.chunks / best.cpu_s
    if limited_by == "client":
        chunks_per_s = min(chunks_per_s, max(levels[failed].chunks, best.chunks) / best.seconds)
    return ClientCapacity(
        chunks_per_s=chunks_per_s,
        requests_per_s=requests_per_s,
        cpu_us_per_chunk=1e6 * best.cpu_s / best.chunks,
        limited_by=limited_by,
    )


async def measure_rate_steps(climb: RateRamp) -> list[RateStep]:
    """As far as the client and the server could follow, and the level at which one could not."""
    spent: list[tuple[float, float]] = [(0.0, 0.0)]  # client's CPU seconds by seconds from the run's start
    started_at = 0.0

    def watch(live: Live) -> None:
        nonlocal started_at
        started_at = live.start_at
        spent.append((live.elapsed_s, sum(progress.cpu_s for progress in live.workers.values())))

    script = Behavior(ttft_s=_GAP_S, tpot_s=_GAP_S)
    async with mock_server_process(script) as server:
        options = LoadOptions(metrics_url=None, drain_s=5.0)
        result = await run_load(server.target, climb.schedule(), options, watch=watch, stop=_is_exhausted)
        records = await server.records()
    known = {record.digest: record for record in records}
    digests = request_digests(server.target, result.schedule)
    ended = [sample for sample in result.samples if sample.outcome is not Outcome.ABORTED]
    pairs = [(s, known[digests[s.index]]) for s in ended if digests[s.index] in known]
    ended_s = max((sample.sent_s for sample, _ in pairs), default=0.0) if result.stopped else math.inf
    windows = [((n + 0.5) * climb.level_s, (n + 1) * climb.level_s) for n in range(climb.levels)]
    return [_rate_step(pairs, window, script, started_at, spent) for window in windows if window[1] <= ended_s]


def _is_exhausted(live: Live) -> bool:
    """So late that more load would show nothing new."""
    return any(sample.sent_s - sample.scheduled_s > 100 * MAX_LATE_S for sample in live.samples[-20:])


def _rate_step(
    pairs: Sequence[tuple[Sample, ServerRecord]],
    window: tuple[float, float],
    script: Behavior,
    started_at: float,
    spent: Sequence[tuple[float, float]],
) -> RateStep:
    """What client and server say about the same chunks, of those written in the window (seconds of the run)."""
    start_s, end_s = window
    client = [s.sent_s - s.scheduled_s for s, _ in pairs if start_s <= s.scheduled_s < end_s]
    server = []
    for sample, record in pairs:
        # A stream that broke has fewer on one side.
        for number, (written_at, noted_s) in enumerate(zip(record.written_s, sample.chunk_times_s, strict=False)):
            written_s = written_at - started_at
            if start_s <= written_s < end_s:
                client.append(noted_s - written_s)
                server.append(written_at - record.arrived_s - script.due_s(number))
    return RateStep(
        seconds=end_s - start_s,
        chunks=len(server),
        cpu_s=_interpolated(spent, end_s) - _interpolated(spent, start_s),
        client_late_s=percentile(client, 99) if client else math.inf,
        server_late_s=percentile(server, 99) if server else math.inf,
    )


def request_digests(target: ServerAddress, schedule: Schedule) -> dict[int, str]:
    """By index, of the bodies of requests that begin a conversation: what the scripted server calls them."""
    maker, found = PromptMaker(target.words_per_token, target.salt), {}
    for chain in schedule.chains:
        for request in chain.requests:
            if request.turn == 0:
                segments = tuple(SegmentMessage(s.key, s.tokens, s.text) for s in request.segments)
                planned = RequestMessage(request.index, segments, request.output_tokens, 0, 0.0)
                found[request.index] = body_digest(ConversationPrompts(target, maker).body(planned))
    return found


async def _requests(seconds: float) -> float:
    mix = RequestMix(_PROMPT, Fixed(1))
    schedule = Workload(name="requests", arrivals=ClosedLoop(_USERS), requests=mix).draw(0, duration_s=seconds)
    async with mock_server_process(Behavior()) as server:
        result = await run_load(server.target, schedule, LoadOptions(metrics_url=None))
    return len(result.samples) / result.wall_s / min(max(result.client_share, 0.01), 1.0)


def _interpolated(points: Sequence[tuple[float, float]], time_s: float) -> float:
    """Between two points, in a straight line."""
    after = min(max(bisect_right(points, (time_s, math.inf)), 1), len(points) - 1)
    (early_s, low), (late_s, high) = points[after - 1], points[after]
    if late_s <= early_s:
        return high
    return low + (high - low) * min((time_s - early_s) / (late_s - early_s), 1.0)


def _capacity_path() -> Path:
    """A name for everything that the figures depend on."""
    environment = (detect_cpu().name, powerband.__version__, platform.python_version())
    return cache_directory() / "load-generator" / f"{hashlib.sha256(repr(environment).encode()).hexdigest()[:20]}.json"
