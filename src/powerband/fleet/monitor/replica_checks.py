"""What is wrong with a single replica: it hangs, fails, is away, is slow, or does not give memory back."""

from __future__ import annotations

from collections.abc import Iterator

from powerband.fleet.monitor.incidents import Finding
from powerband.fleet.monitor.state import RECENT_S, MonitorState
from powerband.gateway.snapshot import ReplicaSnapshot
from powerband.metrics.statistics import wilson

_SILENT_S = 5.0
_GAPS = 20  # of the usual time per output token: longer is silence
_FEWEST_FAILURES = 3
_MOST_FAILING = 0.05
_AWAY_S = 3.0
_HUNG = frozenset({"hung", "probe_timeout"})
_IDLE_S = 20.0
_LEAKED = 0.05  # of the KV cache, in use without a request


def check_replicas(scene: MonitorState) -> list[Finding]:
    """At most one a replica: what explains the others comes first."""
    found: dict[str, Finding] = {}
    for look in (_hanging, _failing, _away, _slow, _leaking):
        for finding in look(scene):
            found.setdefault(finding.subject, finding)
    return list(found.values())


def _hanging(scene: MonitorState) -> Iterator[Finding]:
    limit_s = _silence_s(scene)
    for replica in scene.replicas:
        stuck_s = scene.clock_s - scene.progress[replica.id][1]
        answers = replica.id in scene.figures
        # A replica that answers and goes on only has long answers to make that are not streamed.
        if replica.inflight and replica.silent_s > limit_s and (not answers or stuck_s > limit_s):
            yield Finding(
                kind="replica",
                subject=replica.id,
                cause="hang",
                what=f"Replica {replica.id} has sent nothing for {replica.silent_s:.0f} s"
                f" with {_requests(replica.inflight)} in its hands.",
                evidence={
                    "silent_s": replica.silent_s,
                    "limit_s": limit_s,
                    "inflight": replica.inflight,
                    "metrics": "answers" if answers else "does not answer",
                },
                action="restart_replica",
                advice="Restart it; its requests go on elsewhere.",
            )


def _failing(scene: MonitorState) -> Iterator[Finding]:
    failed, had = scene.lately.failures(scene.clock_s, RECENT_S)
    present = {replica.id for replica in scene.replicas}
    for replica, count in failed.items():
        if replica in present and count >= _FEWEST_FAILURES and wilson(count, had[replica])[0] > _MOST_FAILING:
            broken = (one for seen in scene.lately.within(scene.clock_s, RECENT_S) for one in seen.failed)
            codes = sorted({code for one, code in broken if one == replica})
            yield Finding(
                kind="replica",
                subject=replica,
                cause="errors",
                what=f"Replica {replica} failed {count} of {_requests(had[replica])} in {RECENT_S:.0f} s.",
                evidence={"failed": count, "requests": had[replica], "errors": ", ".join(codes)},
                action="restart_replica",
                advice="Look at its log; restart it.",
            )


def _away(scene: MonitorState) -> Iterator[Finding]:
    for replica in scene.replicas:
        away_s = scene.clock_s - scene.away_s.get(replica.id, scene.clock_s)
        if away_s >= _AWAY_S:
            hung = not _HUNG.isdisjoint(replica.last_errors)
            yield Finding(
                kind="replica",
                subject=replica.id,
                cause="hang" if hung else "down",
                what=f"Replica {replica.id} {'does not answer and ' if hung else ''}"
                f"has been {replica.state} for {away_s:.0f} s.",
                evidence={"state": replica.state, "away_s": away_s, "last_errors": ", ".join(replica.last_errors)},
                action="restart_replica",
                advice="Look at its log; restart it.",
            )


def _slow(scene: MonitorState) -> Iterator[Finding]:
    for slow in scene.residuals.slow(scene.clock_s):
        what = "Steps" if slow.beside == "the model" else "Answers"
        yield Finding(
            kind="replica",
            subject=slow.replica,
            cause="slow_replica",
            what=f"{what} of replica {slow.replica} take {slow.ratio:.2f} times as long as {slow.beside} "
            f"{'predicts' if slow.beside == 'the model' else 'need'}, and those of the others do not.",
            evidence={"ratio": slow.ratio, "beside": slow.beside},
            action="eject_replica" if scene.ready > 1 else "add_replica",
            advice="Replace it by a new one." if scene.ready > 1 else "Start another one beside it.",
        )


def _leaking(scene: MonitorState) -> Iterator[Finding]:
    for replica in scene.replicas:
        idle_s = scene.clock_s - scene.idle_s.get(replica.id, scene.clock_s)
        usage = _kv_usage(scene, replica)
        if idle_s >= _IDLE_S and usage is not None and usage > _LEAKED:
            yield Finding(
                kind="replica",
                subject=replica.id,
                cause="leak",
                what=f"Replica {replica.id} holds {usage:.0%} of its KV cache without a request.",
                evidence={"kv_usage": usage, "idle_s": idle_s},
                action="restart_replica",
                advice="Restart it, and report it: an engine must give blocks back.",
            )


def _kv_usage(scene: MonitorState, replica: ReplicaSnapshot) -> float | None:
    figures = scene.figures.get(replica.id)
    return figures.values.get("kv_usage") if figures is not None else replica.kv_usage


def _silence_s(scene: MonitorState) -> float:
    """How long is too long without a byte: beyond the time per output token and all that may take its time to begin."""
    slo, predicted = scene.expected.slo, scene.expected.predicted.get("ttft_s")
    gap_s = scene.usual.get("tpot_s", slo.tpot_s or 0.0)
    begun_s = [seen.ttft_s - seen.queue_s for seen in scene.lately.within(scene.clock_s, 60.0) if seen.ttft_s]
    return max(
        _SILENT_S, _GAPS * gap_s, slo.ttft_s or 0.0, predicted.high if predicted else 0.0, 2 * max(begun_s, default=0.0)
    )


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"
