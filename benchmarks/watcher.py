"""Does the watcher find what is wrong, soon, and nothing else? Faults with known times, in virtual time.

    python -m benchmarks.watcher                       # 20 seeds, about 2 minutes
    python -m benchmarks.watcher --seeds 2 --hours 0.5

Six replicas (three for the short test) answer a stream of requests; what they do is played in quarters of a second: a
step takes a time that grows with the batch and with the prompts in it, 12 % of noise on each step, a slow drift of
±5 % of every replica, and a latency model that is off by up to ±5 %, depending on the load. Into calm time come faults:

    slow x2, 1.35, 1.2   one replica's steps              overload   twice the planned rate
    hang                 one replica stops; the pool      cache      no prompt is found in any cache
                         ejects it after 3 s              leak       one replica keeps KV blocks while nothing comes
    errors               one replica fails half of what it gets; the pool sends it elsewhere
    crash                one replica is gone with what it had

and what is no fault: bursts within the plan (8 of 40 s at 1.7 times the mean rate), a change of the mix (prompts 1.6
times as long, answers 0.7 times), a replica whose /metrics cannot be reached, and a watcher that is started anew.

The same again with 20 % of noise and ±7 % of drift, and with engines that tell nothing of their steps (vLLM's, or ours
without a calibration; without the two lesser slowdowns, which answers alone do not tell). Beside it stand rules on raw
figures, see watcher_peers.py. Bed and watcher have the same author: what this shows is that the parts work together and
how soon, not how the watcher does in a data centre.

Scored by event: a fault is found when an incident that is open during it (or opens within 30 s after) names its cause,
and the replica where it is one's. An incident that matches no fault is a false alarm. Delay: from the fault's begin to
the incident's. Every fault lasts 150 s; 240 s of calm come after it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import random
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median

from benchmarks.watcher_peers import Peer, enova_rule, three_sigma, ttft_over_slo

from powerband.fleet.monitor.incidents import Incident
from powerband.fleet.monitor.monitor import Action, Monitor
from powerband.fleet.monitor.state import Observation, SLOTarget
from powerband.gateway.request import CompletedRequest, GatewayRequest
from powerband.gateway.snapshot import PoolSnapshot, ReplicaSnapshot
from powerband.metrics.prometheus import RATIO_BUCKETS, Histogram
from powerband.metrics.record import Outcome, RequestRecord
from powerband.metrics.slo import slo_misses
from powerband.metrics.statistics import wilson
from powerband.spec.slo import SLO

RESULT = Path(__file__).parent / "results" / "watcher.json"
TICK_S = 0.25
FAULT_S, CALM_S, WARM_S = 150.0, 240.0, 180.0
AFTER_S = 30.0
SLOW = {"slow2": 2.0, "slow1.35": 1.35, "slow1.2": 1.2}
FAULTS = (*SLOW, "hang", "errors", "crash", "overload", "cache", "leak")
NO_FAULTS = ("burst", "mix", "blind", "restart")
OF_ONE = (*SLOW, "hang", "errors", "crash", "leak", "blind")
CAUSES = {
    **dict.fromkeys(SLOW, ("slow_replica",)),
    "crash": ("errors", "down"),
    "hang": ("hang",),
    "errors": ("errors",),
    "overload": ("load",),
    "cache": ("cache",),
    "leak": ("leak",),
}
EPOCH = 1_700_000_000.0
SLO_HERE = SLO(ttft_s=1.0, tpot_s=0.08, attainment=0.95)
RATE = 1.6  # of requests a second and replica, in the plan
PROMPT, OUTPUT, CACHED_SHARE = 1200, 90, 0.75
SEATS = 16
# Seconds of a step: its base, per request in the batch, and per token of a prompt that it reads.
BASE_S, SEAT_S, PREFILL_S = 0.018, 0.0012, 0.0003
NOISE, DRIFT = 0.12, 0.05
EJECTED_AFTER_S = 3.0


@dataclass(frozen=True, slots=True)
class Event:
    kind: str
    start_s: float
    end_s: float
    replica: str = ""


@dataclass(slots=True)
class _Request:
    number: int
    arrival_s: float
    prompt: int
    output: int
    cached: int = 0
    to_read: float = 0.0  # of its prompt
    made: float = 0.0
    sent_s: float = 0.0
    first_s: float = 0.0
    replicas: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class _Replica:
    id: str
    drift: float
    running: list[_Request] = field(default_factory=list)
    tokens: float = 0.0
    residuals: Histogram = field(default_factory=lambda: Histogram(RATIO_BUCKETS))
    byte_s: float = 0.0
    ejected_s: float | None = None
    errors: tuple[str, ...] = ()
    unsampled: float = 0.0
    leaked: bool = False

    def metrics(self, is_calibrated: bool) -> str:
        used = 0.3 if self.leaked else 0.0
        lines = [
            f"powerband_requests_running {len(self.running)}",
            "powerband_requests_waiting 0",
            f"powerband_kv_cache_usage_ratio {min(used + 0.03 * len(self.running), 1.0)}",
            f"powerband_generation_tokens_total {self.tokens}",
        ]
        if is_calibrated:
            for bound, count in self.residuals.cumulative():
                lines.append(f'powerband_step_residual_ratio_bucket{{le="{bound}"}} {count}')
        return "\n".join(lines)


class Bed:
    """A service in virtual time, with the watcher before it. calibrated: its engines know their latency model."""

    def __init__(
        self, seed: int, events: list[Event], *, replicas: int, calibrated: bool = True, harsh: bool = False
    ) -> None:
        self.noise, self.drift = (0.20, 0.07) if harsh else (NOISE, DRIFT)
        self.peers = {
            "enova rule": enova_rule(),
            "TTFT over SLO": ttft_over_slo(SLO_HERE.ttft_s or 1.0),
            "3 sigma": three_sigma(WARM_S - 10),
        }
        self.chance = random.Random(seed)
        self.events = events
        self.calibrated = calibrated
        self.replicas = [_Replica(f"r{n}", self.chance.uniform(0, 2 * math.pi)) for n in range(replicas)]
        self.rate = RATE * replicas
        self.queue: deque[_Request] = deque()
        self.finished: list[CompletedRequest] = []
        self.now = 0.0
        self.next_s = 0.0
        self.count = 0
        self.expected = SLOTarget(slo=SLO_HERE, rate=self.rate)
        self.watcher = Monitor(self.expected)
        self.actions: list[Action] = []
        self.kept: dict[str, list[int]] = {}  # by kind of event: requests that kept the SLO, and requests

    def play(self, until_s: float) -> tuple[Incident, ...]:
        ticks = round(until_s / TICK_S)
        for tick in range(ticks):
            self.now = tick * TICK_S
            self._arrive()
            self._dispatch()
            for replica in self.replicas:
                self._work(replica)
            if any(
                event.kind == "restart" and event.start_s <= self.now < event.start_s + TICK_S for event in self.events
            ):
                self.watcher = Monitor(self.expected, self.watcher.incidents)
            if tick % round(1 / TICK_S) == 0:
                self._observe()
        return self.watcher.incidents.all

    def _is(self, kind: str, replica: _Replica | None = None) -> bool:
        now = [event for event in self.events if event.kind == kind and event.start_s <= self.now < event.end_s]
        return any(replica is None or event.replica in ("", replica.id) for event in now)

    # ---- clients

    def _arrive(self) -> None:
        while self.next_s <= self.now:
            rate = 0.85 * self.rate
            if self._is("overload"):
                rate = 2.0 * self.rate
            if self._is("burst"):  # as many as ever, but some seconds have most of them
                rate *= 1.7 if self.now % 40 < 8 else 0.825
            if self._is("leak"):
                rate = 0.001
            mixed = self._is("mix")
            if not self._is("leak"):
                prompt = self.chance.lognormvariate(math.log(PROMPT * (1.6 if mixed else 1.0)), 0.5)
                output = self.chance.lognormvariate(math.log(OUTPUT * (0.7 if mixed else 1.0)), 0.5)
                self.count += 1
                self.queue.append(_Request(self.count, self.next_s, max(int(prompt), 8), max(int(output), 2)))
                self.next_s += self.chance.expovariate(rate)
            else:
                self.next_s += TICK_S

    # ---- the pool: late binding, least outstanding; hung replicas are ejected

    def _dispatch(self) -> None:
        while self.queue and self.now - self.queue[0].arrival_s > 3.0:
            late = self.queue.popleft()
            self._end(late, Outcome.REFUSED, status=503, error="expired")
        while self.queue:
            free = [one for one in self.replicas if one.ejected_s is None and len(one.running) < SEATS]
            if not free:
                return
            request = self.queue.popleft()
            replica = min(free, key=lambda one: (one.id in request.replicas, len(one.running)))
            request.replicas += (replica.id,)
            if self._is("errors", replica) and self.chance.random() < 0.5:
                replica.errors = ("http_500",)
                request.failed += ((replica.id, "http_500"),)
                self.queue.appendleft(request)
                continue
            hits = 0.0 if self._is("cache") else self.chance.uniform(0.7, 1.3) * CACHED_SHARE
            request.cached = int(request.prompt * min(hits, 0.95))
            request.to_read = request.prompt - request.cached
            request.sent_s = self.now
            if not replica.running:
                replica.byte_s = self.now
            replica.running.append(request)

    def _work(self, replica: _Replica) -> None:
        replica.leaked = self._is("leak", replica)
        if self._is("crash", replica):
            self._crash(replica)
            return
        if self._is("hang", replica):
            if replica.running and self.now - replica.byte_s > EJECTED_AFTER_S and replica.ejected_s is None:
                replica.ejected_s, replica.errors = self.now, ("hung",)
                for request in reversed(replica.running):
                    request.made, request.first_s = 0.0, 0.0
                    request.failed += ((replica.id, "hung"),)
                    self.queue.appendleft(request)
                replica.running = []
            return
        if replica.ejected_s is not None:
            replica.ejected_s = None  # its probes are good again
        if not replica.running:
            return
        reading = [one for one in replica.running if one.to_read > 0]
        budget = 512.0  # prompt tokens a step
        seats = len(replica.running)
        chunk = min(budget, sum(one.to_read for one in reading))
        predicted_s = BASE_S + SEAT_S * seats + PREFILL_S * chunk
        bias = 1 + 0.05 * math.sin(seats)
        drift = 1 + self.drift * math.sin(2 * math.pi * self.now / 5400 + replica.drift)
        slow = max((factor for kind, factor in SLOW.items() if self._is(kind, replica)), default=1.0)
        step_s = predicted_s * bias * drift * slow
        steps = TICK_S / step_s
        replica.unsampled += steps / 8
        while replica.unsampled >= 1:
            replica.unsampled -= 1
            replica.residuals.observe(step_s / predicted_s * self.chance.lognormvariate(0, self.noise))
        read = steps * budget
        for request in list(replica.running):
            if request.to_read > 0:
                used = min(read, request.to_read)
                request.to_read -= used
                read -= used
                if request.to_read <= 0:
                    request.first_s = self.now + self.chance.uniform(0, TICK_S)
                    request.made = 1
                continue
            request.made += steps
            replica.tokens += steps
            if request.made >= request.output:
                replica.running.remove(request)
                over = (request.made - request.output) / steps * TICK_S
                self._end(request, Outcome.OK, last_s=max(self.now + TICK_S - over, request.first_s))
        replica.byte_s = self.now

    def _crash(self, replica: _Replica) -> None:
        """What it had goes elsewhere; its probes fail, as if it took as long as the fault to come back."""
        if replica.ejected_s is None:
            replica.ejected_s, replica.errors = self.now, ("connection_lost",)
            for request in reversed(replica.running):
                request.made, request.first_s = 0.0, 0.0
                request.failed += ((replica.id, "reset"),)
                self.queue.appendleft(request)
            replica.running = []

    def _end(
        self, request: _Request, outcome: Outcome, *, status: int = 200, error: str = "", last_s: float = 0.0
    ) -> None:
        is_ok = outcome is Outcome.OK
        end_s = last_s if is_ok else self.now
        record = RequestRecord(
            scheduled_s=request.arrival_s,
            sent_s=request.sent_s,
            chunk_times_s=(request.first_s, last_s) if is_ok else (),
            chunk_tokens=(1, request.output - 1) if is_ok else (),
            outcome=outcome,
            prompt_tokens=request.prompt,
            output_tokens=request.output if is_ok else 0,
            cached_tokens=request.cached,
        )
        is_good = not slo_misses(record, SLO_HERE)
        for event in self.events:
            if event.start_s <= self.now < event.end_s:
                kept = self.kept.setdefault(event.kind, [0, 0])
                kept[0] += is_good
                kept[1] += 1
        self.finished.append(
            CompletedRequest(
                request=GatewayRequest(id=f"req-{request.number}", endpoint="chat", model="demo", stream=True),
                record=record,
                status=status,
                ended_at=EPOCH + end_s,
                error=error,
                replicas=request.replicas,
                failed=request.failed,
                seconds=end_s - request.arrival_s,
                queue_s=max(request.sent_s - request.arrival_s, 0.0),
            )
        )

    # ---- what the watcher is shown

    def _observe(self) -> None:
        seats = sum(len(one.running) for one in self.replicas)
        pool = PoolSnapshot(
            model="demo",
            queued=len(self.queue),
            predicted_wait_s=len(self.queue) / max(self.rate, 0.1),
            replicas=tuple(
                ReplicaSnapshot(
                    id=one.id,
                    state="ready" if one.ejected_s is None else "ejected",
                    inflight=len(one.running),
                    silent_s=self.now - one.byte_s if one.running else 0.0,
                    last_errors=one.errors,
                )
                for one in self.replicas
            ),
        )
        silent = ("hang", "blind", "crash")
        told = [one for one in self.replicas if not any(self._is(kind, one) for kind in silent)]
        metrics = {one.id: one.metrics(self.calibrated) for one in told}
        seen, self.finished = tuple(self.finished), []
        assert seats <= SEATS * len(self.replicas)
        shown = Observation(now_s=EPOCH + self.now, clock_s=self.now, completed=seen, pools=(pool,), metrics=metrics)
        self.actions += self.watcher.observe(shown)
        for peer in self.peers.values():
            peer.observe(shown)


def events_of(seed: int, replicas: int, hours: float, kinds: tuple[str, ...] = FAULTS + NO_FAULTS) -> list[Event]:
    """Every kind in turn, in an order of the seed's, until the time is over."""
    chance = random.Random(seed)
    events: list[Event] = []
    now = WARM_S
    while True:
        for kind in chance.sample(kinds, len(kinds)):
            if now + FAULT_S + CALM_S > hours * 3600:
                return events
            one = f"r{chance.randrange(replicas)}" if kind in OF_ONE else ""
            events.append(Event(kind, now, now + FAULT_S, one))
            now += FAULT_S + CALM_S + chance.uniform(0, 30)


@dataclass(slots=True)
class Score:
    found: dict[str, list[float]] = field(default_factory=dict)  # delays by kind
    events: dict[str, int] = field(default_factory=dict)
    false_alarms: list[str] = field(default_factory=list)
    true_alarms: int = 0
    peers: dict[str, list[int]] = field(default_factory=dict)  # alarms that were right, alarms, and faults found
    kept: dict[str, list[int]] = field(default_factory=dict)  # requests within the SLO, and requests, by kind of event
    hours: float = 0.0
    replica_days: float = 0.0

    def add(self, other: Score) -> None:
        for kind, delays in other.found.items():
            self.found.setdefault(kind, []).extend(delays)
        for kind, count in other.events.items():
            self.events[kind] = self.events.get(kind, 0) + count
        for kind, (good, count) in other.kept.items():
            before = self.kept.get(kind, [0, 0])
            self.kept[kind] = [before[0] + good, before[1] + count]
        for name, counts in other.peers.items():
            self.peers[name] = [a + b for a, b in zip(self.peers.get(name, [0, 0, 0]), counts, strict=True)]
        self.false_alarms += other.false_alarms
        self.true_alarms += other.true_alarms
        self.hours += other.hours
        self.replica_days += other.replica_days

    @property
    def recall(self) -> float:
        told = sum(self.events[kind] for kind in FAULTS if kind in self.events)
        return sum(map(len, self.found.values())) / told if told else math.nan

    @property
    def precision(self) -> float:
        alarms = self.true_alarms + len(self.false_alarms)
        return self.true_alarms / alarms if alarms else math.nan


def scored(events: list[Event], incidents: tuple[Incident, ...], hours: float, replicas: int) -> Score:
    score = Score(hours=hours, replica_days=hours * replicas / 24)
    for event in events:
        score.events[event.kind] = score.events.get(event.kind, 0) + 1
    faults = [event for event in events if event.kind in FAULTS]
    found: dict[int, float] = {}
    for incident in incidents:
        opened_s = incident.opened_at - EPOCH
        for number, event in enumerate(faults):
            if not event.start_s <= opened_s <= event.end_s + AFTER_S or incident.cause not in CAUSES[event.kind]:
                continue
            culprit = incident.subject if incident.kind == "replica" else str(incident.evidence.get("replica", ""))
            if event.replica and culprit != event.replica:
                continue
            found[number] = min(found.get(number, math.inf), opened_s - event.start_s)
            score.true_alarms += 1
            break
        else:
            during = [event.kind for event in events if event.start_s <= opened_s <= event.end_s + AFTER_S]
            score.false_alarms.append(
                f"{incident.kind}/{incident.cause} {incident.subject} during {','.join(during) or 'calm'}"
            )
    for number, delay_s in found.items():
        score.found.setdefault(faults[number].kind, []).append(delay_s)
    return score


def peers_scored(events: list[Event], peers: dict[str, Peer]) -> dict[str, list[int]]:
    found = {}
    faults = [event for event in events if event.kind in FAULTS]
    for name, peer in peers.items():
        right, hit = 0, set()
        for subject, begun_s in peer.alarms.begun:
            matches = [
                number
                for number, event in enumerate(faults)
                if event.start_s <= begun_s <= event.end_s + AFTER_S and event.replica in ("", subject)
            ]
            right += bool(matches)
            hit.update(matches)
        found[name] = [right, len(peer.alarms.begun), len(hit)]
    return found


def run(seed: int, *, replicas: int, hours: float, calibrated: bool, harsh: bool = False) -> Score:
    kinds: tuple[str, ...] = FAULTS + NO_FAULTS
    if not calibrated:
        kinds = tuple(
            kind for kind in kinds if kind not in ("slow1.35", "slow1.2")
        )  # answers alone do not tell so little
    events = events_of(seed, replicas, hours, kinds)
    bed = Bed(seed, events, replicas=replicas, calibrated=calibrated, harsh=harsh)
    score = scored(events, bed.play(hours * 3600), hours, replicas)
    score.kept = bed.kept
    score.peers = peers_scored(events, bed.peers)
    return score


def shown(score: Score) -> list[str]:
    lines = [f"{'fault':<10} {'found':>9} {'delay p50':>10} {'most':>7}"]
    for kind in FAULTS:
        if kind in score.events:
            delays = score.found.get(kind, [])
            spread = f"{median(delays):8.0f} s {max(delays):5.0f} s" if delays else f"{'–':>10} {'–':>7}"
            lines.append(f"{kind:<10} {len(delays):>4}/{score.events[kind]:<4} {spread}")
    low, high = wilson(sum(map(len, score.found.values())), sum(score.events.get(kind, 0) for kind in FAULTS))
    lines.append(
        f"recall {score.recall:.3f} ({low:.3f} to {high:.3f}), precision {score.precision:.3f}, "
        f"{len(score.false_alarms)} false alarms in {score.hours:.1f} h "
        f"({len(score.false_alarms) / score.replica_days:.2f} per replica and day), "
        "with " + ", ".join(f"{score.events.get(kind, 0)} {kind}" for kind in NO_FAULTS)
    )
    faults = sum(score.events.get(kind, 0) for kind in FAULTS)
    for name, (right, alarms, hit) in score.peers.items():
        precision = f"{right / alarms:.3f}" if alarms else "–"
        lines.append(f"beside it, {name}: recall {hit / faults:.3f}, precision {precision} of {alarms} alarms")
    shares = {kind: good / count for kind, (good, count) in sorted(score.kept.items()) if count}
    lines.append("SLO kept meanwhile: " + ", ".join(f"{kind} {share:.3f}" for kind, share in shares.items()))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--hours", type=float, default=1.2)
    parser.add_argument("--replicas", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    results = {}
    for name, calibrated, harsh in (
        ("calibrated engines", True, False),
        ("calibrated engines, 20 % noise and 7 % drift", True, True),
        ("engines that tell nothing of their steps", False, False),
    ):
        begun_s, total = time.monotonic(), Score()
        for seed in range(options.seeds):
            total.add(run(seed, replicas=options.replicas, hours=options.hours, calibrated=calibrated, harsh=harsh))
        print(f"{name}: {options.seeds} seeds of {options.hours:g} h in {time.monotonic() - begun_s:.0f} s")
        print("\n".join(f"  {line}" for line in shown(total)))
        for alarm in sorted(set(total.false_alarms)):
            print(f"  false: {alarm} ({total.false_alarms.count(alarm)} times)")
        delays = [delay for found in total.found.values() for delay in found]
        results[name] = {
            **asdict(total),
            "recall": total.recall,
            "precision": total.precision,
            "delay_p50_s": median(delays) if delays else None,
            "delay_mean_s": fmean(delays) if delays else None,
        }
    about = {"python": platform.python_version(), "seeds": options.seeds, "hours": options.hours}
    options.out.write_text(json.dumps({"about": {**about, "replicas": options.replicas}, **results}, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
