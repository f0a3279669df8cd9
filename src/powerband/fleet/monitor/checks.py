"""Checks of each replica and of the whole service. A finding says what is wrong, its likely cause, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from powerband.fleet.monitor.incidents import SERVICE, ActionKind, Cause, Finding
from powerband.fleet.monitor.state import RECENT_S, MonitorState
from powerband.gateway.snapshot import ReplicaSnapshot
from powerband.metrics.record import Outcome
from powerband.metrics.statistics import wilson
from powerband.spec.quantities import count_text

Evidence = dict[str, float | str]

# Of a replica
_MIN_SILENCE_S = 5.0
_SILENT_TOKEN_TIMES = 20  # multiple of the usual time per output token
_MIN_FAILURES = 3
_MAX_FAILURE_RATIO = 0.05
_MIN_EJECTED_S = 3.0
_HANG_ERRORS = frozenset({"hung", "probe_timeout"})
_MIN_IDLE_S = 20.0
_MAX_IDLE_KV_USAGE = 0.05
# Of the service
_MIN_GATEWAY_DOWN_S = 5.0
_OVERLOAD_RATIO = 1.1  # of the plan's rate
_MIN_OVERLOAD_S = 10.0
_MIN_RESPONSES = 20
_CACHE_DROP = 0.6  # of the usual fraction of cached prompt tokens
_MIN_CACHED_SHARE = 0.1
_LARGER_REQUESTS = 1.5  # times the usual length
_MAX_CPU_PRESSURE, _MAX_MEMORY_PRESSURE, _MIN_FREE_MEMORY = 0.4, 0.1, 0.03


def check_replicas(state: MonitorState) -> list[Finding]:
    """At most one finding per replica: that of the first failing check, which explains the others."""
    found: dict[str, Finding] = {}
    for check in (_check_hang, _check_failures, _check_ejected, _check_slow, _check_leak):
        for finding in check(state):
            found.setdefault(finding.subject, finding)
    return list(found.values())


def check_service(state: MonitorState, of_replicas: Sequence[Finding]) -> Iterator[Finding]:
    """Findings about the whole service. of_replicas: the findings of check_replicas, which may explain them."""
    if (violated := _check_slo(state, of_replicas)) is not None:
        yield violated
    yield from _check_model(state)
    yield from _check_memory(state)
    if state.gateway_down_since_s is not None and state.clock_s - state.gateway_down_since_s >= _MIN_GATEWAY_DOWN_S:
        down_s = state.clock_s - state.gateway_down_since_s
        yield Finding(
            kind="gateway",
            subject=SERVICE,
            cause="down",
            what=f"The gateway has not responded for {down_s:.0f} s.",
            evidence={"away_s": down_s},
            advice="Look at its log. If it exits, the controller starts another one.",
        )


def check_crashes(crashes: Sequence[str]) -> Iterator[Finding]:
    """crashes: since the last check, a sentence each. Crashes that follow each other are one incident."""
    if crashes:
        yield Finding(
            kind="replica",
            subject=SERVICE,
            cause="down",
            what=f"{'; '.join(crashes).rstrip('.')}.",
            advice="The controller starts another one. 'powerband events' lists crashes, 'powerband logs' shows why.",
        )


# ---- checks of each replica


def _check_hang(state: MonitorState) -> Iterator[Finding]:
    limit_s = _max_silence_s(state)
    for replica in state.replicas:
        stuck_s = state.clock_s - state.progress[replica.id][1]
        has_metrics = replica.id in state.metrics
        # A replica whose token counters still grow is only busy with long responses that are not streamed.
        if replica.inflight and replica.silent_s > limit_s and (not has_metrics or stuck_s > limit_s):
            yield Finding(
                kind="replica",
                subject=replica.id,
                cause="hang",
                what=f"Replica {replica.id} has sent nothing for {replica.silent_s:.0f} s"
                f" with {count_text(replica.inflight, 'request')} in flight.",
                evidence={
                    "silent_s": replica.silent_s,
                    "limit_s": limit_s,
                    "inflight": replica.inflight,
                    "metrics": "answers" if has_metrics else "does not answer",
                },
                action="restart_replica",
                advice="Restart it; other replicas take over its requests.",
            )


def _check_failures(state: MonitorState) -> Iterator[Finding]:
    failed, sent = state.traffic.failures(state.clock_s, RECENT_S)
    present = {replica.id for replica in state.replicas}
    for replica, count in failed.items():
        is_certain = count >= _MIN_FAILURES and wilson(count, sent[replica])[0] > _MAX_FAILURE_RATIO
        if replica in present and is_certain:
            recent = state.traffic.within(state.clock_s, RECENT_S)
            codes = sorted({code for sample in recent for one, code in sample.failures if one == replica})
            yield Finding(
                kind="replica",
                subject=replica,
                cause="errors",
                what=f"Replica {replica} failed {count} of {count_text(sent[replica], 'request')} in {RECENT_S:.0f} s.",
                evidence={"failed": count, "requests": sent[replica], "errors": ", ".join(codes)},
                action="restart_replica",
                advice="Look at its log; restart it.",
            )


def _check_ejected(state: MonitorState) -> Iterator[Finding]:
    for replica in state.replicas:
        ejected_s = state.clock_s - state.ejected_since_s.get(replica.id, state.clock_s)
        if ejected_s >= _MIN_EJECTED_S:
            is_hung = not _HANG_ERRORS.isdisjoint(replica.last_errors)
            yield Finding(
                kind="replica",
                subject=replica.id,
                cause="hang" if is_hung else "down",
                what=f"Replica {replica.id} {'does not respond and ' if is_hung else ''}"
                f"has been {replica.state} for {ejected_s:.0f} s.",
                evidence={"state": replica.state, "away_s": ejected_s, "last_errors": ", ".join(replica.last_errors)},
                action="restart_replica",
                advice="Look at its log; restart it.",
            )


def _check_slow(state: MonitorState) -> Iterator[Finding]:
    is_alone = state.num_ready <= 1
    for slow in state.residuals.slow_replicas(state.clock_s):
        what, verb = ("Steps", "predicts") if slow.reference == "the model" else ("Responses", "need")
        yield Finding(
            kind="replica",
            subject=slow.replica,
            cause="slow_replica",
            what=f"{what} of replica {slow.replica} take {slow.ratio:.2f} times as long as {slow.reference} {verb}, "
            "and those of the others do not.",
            evidence={"ratio": slow.ratio, "beside": slow.reference},
            action="add_replica" if is_alone else "eject_replica",
            advice="Start another replica." if is_alone else "Replace it by a new replica.",
        )


def _check_leak(state: MonitorState) -> Iterator[Finding]:
    for replica in state.replicas:
        idle_s = state.clock_s - state.idle_since_s.get(replica.id, state.clock_s)
        usage = _kv_usage(state, replica)
        if idle_s >= _MIN_IDLE_S and usage is not None and usage > _MAX_IDLE_KV_USAGE:
            yield Finding(
                kind="replica",
                subject=replica.id,
                cause="leak",
                what=f"Replica {replica.id} uses {usage:.0%} of its KV cache without a request.",
                evidence={"kv_usage": usage, "idle_s": idle_s},
                action="restart_replica",
                advice="Restart it, and report a bug: the engine must free the blocks.",
            )


def _kv_usage(state: MonitorState, replica: ReplicaSnapshot) -> float | None:
    metrics = state.metrics.get(replica.id)
    return metrics.values.get("kv_usage") if metrics is not None else replica.kv_usage


def _max_silence_s(state: MonitorState) -> float:
    """How long a replica may send nothing: longer than the time per output token, and than a first token takes."""
    slo, predicted = state.target.slo, state.target.predicted.get("ttft_s")
    tpot_s = state.baseline.get("tpot_s", slo.tpot_s or 0.0)
    recent = state.traffic.within(state.clock_s, 60.0)
    max_ttft_s = max((sample.ttft_s - sample.queue_s for sample in recent if sample.ttft_s), default=0.0)
    return max(
        _MIN_SILENCE_S,
        _SILENT_TOKEN_TIMES * tpot_s,
        slo.ttft_s or 0.0,
        predicted.high if predicted else 0.0,
        2 * max_ttft_s,
    )


# ---- checks of the service: the SLO


@dataclass(frozen=True, slots=True)
class _Explanation:
    """A likely cause of missed SLOs, as a sentence."""

    cause: Cause
    what: str
    evidence: Evidence
    action: ActionKind
    advice: str


def _check_slo(state: MonitorState, of_replicas: Sequence[Finding]) -> Finding | None:
    """Find out whether misses burn the error budget too fast, or the load exceeds the plan and requests suffer."""
    alert = state.burn.alert(state.clock_s)
    overload = _overload(state)
    if alert is None and overload is None:
        return None
    guaranteed = state.target.slo.attainment
    evidence: Evidence = {"promised_attainment": guaranteed}
    if alert is not None:
        counts = state.burn.window(state.clock_s, alert.long_s)
        attained = counts.attainment or 0.0
        what = f"{attained:.1%} of {count_text(counts.total, 'request')} met the SLO in {alert.long_s} s; "
        what += f"the plan guarantees {guaranteed:.1%}."
        misses = state.burn.misses(state.clock_s, alert.long_s)
        evidence |= {
            "attainment": attained,
            "window_s": alert.long_s,
            "burn": state.burn.burn_rate(state.clock_s, alert.long_s) or 0.0,
            "missed": ", ".join(f"{name} {count}" for name, count in misses.items()),
        }
    else:
        what = "The service gets more load than its plan is made for, and requests wait too long or are rejected."
    finding = Finding(kind="promise", subject=SERVICE, cause="unknown", what=what, evidence=evidence)
    return _explain(state, finding, of_replicas, overload)


def _explain(
    state: MonitorState, finding: Finding, of_replicas: Sequence[Finding], overload: Evidence | None
) -> Finding:
    """The finding with the most likely cause, and advice."""
    order: list[Cause] = ["hang", "errors", "down", "slow_replica"]
    load = _explain_by_load(overload)
    if load is not None and "planned_rate" in load.evidence:
        # The plan guarantees nothing for this load, and it may be the reason that replicas fail.
        return _with_explanation(finding, load)
    culprits = sorted((one for one in of_replicas if one.cause in order), key=lambda one: order.index(one.cause))
    if culprits:
        one = culprits[0]
        evidence = {**finding.evidence, **one.evidence, "replica": one.subject}
        # The replica's own incident suggests the action; this one only explains.
        return replace(
            finding, cause=one.cause, what=f"{finding.what} {one.what}", evidence=evidence, advice=one.advice
        )
    for explanation in (
        load,
        _explain_by_cache(state),
        _explain_by_length(state),
        _explain_by_host(state),
        _explain_by_model(state),
    ):
        if explanation is not None:
            return _with_explanation(finding, explanation)
    return replace(finding, action="replan", advice="Compare /metrics with the plan, and plan again.")


def _with_explanation(finding: Finding, explanation: _Explanation) -> Finding:
    return replace(
        finding,
        cause=explanation.cause,
        what=f"{finding.what} {explanation.what}",
        evidence={**finding.evidence, **explanation.evidence},
        action=explanation.action,
        advice=explanation.advice,
    )


def _explain_by_load(overload: Evidence | None) -> _Explanation | None:
    if overload is None:
        return None
    what = f"The load is higher than planned: {overload['rate']:.2f} requests/s"
    what += f", planned for {overload['planned_rate']:.2f}." if "planned_rate" in overload else "."
    return _Explanation("load", what, overload, "add_replica", "Add a replica, or plan again for this load.")


def _explain_by_cache(state: MonitorState) -> _Explanation | None:
    usual = state.baseline.get("cached_share", 0.0)
    share = state.traffic.figures(state.clock_s, RECENT_S).get("cached_share")
    if share is None or usual < _MIN_CACHED_SHARE or share > _CACHE_DROP * usual:
        return None
    what = f"Only {share:.0%} of prompt tokens came from the prefix cache; usually {usual:.0%} do."
    advice = "Check whether prompts still share prefixes and are routed by them; plan again without the cache."
    return _Explanation("cache", what, {"cached_share": share, "usual_cached_share": usual}, "replan", advice)


def _explain_by_length(state: MonitorState) -> _Explanation | None:
    recent = state.traffic.figures(state.clock_s, RECENT_S)
    changed: Evidence = {}
    if recent["answered"] < _MIN_RESPONSES:
        return None
    for name in ("prompt_tokens", "output_tokens"):
        usual = state.baseline.get(name, 0.0)
        if usual > 0 and recent.get(name, 0.0) > _LARGER_REQUESTS * usual:
            changed |= {name: recent[name], f"usual_{name}": usual}
    if not changed:
        return None
    return _Explanation("mix", "Requests are longer than usual.", changed, "replan", "Plan for longer requests.")


def _explain_by_host(state: MonitorState) -> _Explanation | None:
    pressure = _host_pressure(state)
    if pressure is None:
        return None
    advice = "Move other work off this machine, or plan for the capacity that is left."
    return _Explanation("host", "The machine is short of processor time or memory.", pressure, "replan", advice)


def _explain_by_model(state: MonitorState) -> _Explanation | None:
    ratio = state.residuals.model_ratio(state.clock_s)
    if ratio is None:
        return None
    what = f"Steps take {ratio:.2f} times as long as predicted, at all replicas."
    return _Explanation("model", what, {"ratio": ratio}, "replan", "Calibrate, and plan again.")


def _overload(state: MonitorState) -> Evidence | None:
    """More load than planned (beyond chance), with consequences. Without a planned rate: the consequences alone."""
    clock_s, target = state.clock_s, state.target
    count, seconds = state.traffic.arrivals(clock_s, RECENT_S)
    if seconds < _MIN_OVERLOAD_S or not count:
        return None
    if target.rate is not None:
        planned = target.rate * seconds
        if count <= _OVERLOAD_RATIO * planned + 3 * math.sqrt(planned):
            return None
    recent = state.traffic.within(clock_s, _MIN_OVERLOAD_S)
    rejected = sum(sample.outcome is Outcome.REFUSED and sample.status == 503 for sample in recent)
    wait_s = max((pool.predicted_wait_s for pool in state.pools), default=0.0)
    attained = state.burn.window(clock_s, RECENT_S).attainment
    is_late = wait_s > (target.slo.ttft_s or math.inf) / 2
    is_missing = attained is not None and attained < target.slo.attainment and target.rate is not None
    if not (rejected > state.burn.error_budget * count / 3 or is_late or is_missing):
        return None
    found: Evidence = {
        "rate": count / seconds,
        "queued": sum(pool.queued for pool in state.pools),
        "refused": rejected,
        "predicted_wait_s": wait_s,
    }
    return found if target.rate is None else {**found, "planned_rate": target.rate}


# ---- checks of the service: its latency model and its machine


def _check_model(state: MonitorState) -> Iterator[Finding]:
    ratio = state.residuals.model_ratio(state.clock_s)
    if ratio is None:
        return
    pressure = _host_pressure(state)
    yield Finding(
        kind="model",
        subject=SERVICE,
        cause="host" if pressure else "model",
        what=f"Steps take {ratio:.2f} times as long as the latency model predicts, at all replicas.",
        evidence={"ratio": ratio, **(pressure or {})},
        action="replan",
        advice="Move other work off this machine." if pressure else "Calibrate, and plan again.",
    )


def _check_memory(state: MonitorState) -> Iterator[Finding]:
    host = state.host
    if host is None or not host.memory_bytes:
        return
    free = host.available_memory_bytes / host.memory_bytes
    if free < _MIN_FREE_MEMORY:
        yield Finding(
            kind="host",
            subject=SERVICE,
            cause="memory",
            what=f"The machine has {host.available_memory_bytes / 2**30:.2f} GiB of memory left ({free:.1%}).",
            evidence={"available_bytes": host.available_memory_bytes, "memory_bytes": host.memory_bytes},
            advice="Stop other work, or give each replica less KV cache.",
        )


def _host_pressure(state: MonitorState) -> Evidence | None:
    """A shortage of processor time or memory on the machine; None: it has enough of both."""
    host = state.host
    if host is None:
        return None
    is_busy = host.load > 2 * host.cores or (host.cpu_pressure or 0.0) > _MAX_CPU_PRESSURE
    if not is_busy and (host.memory_pressure or 0.0) <= _MAX_MEMORY_PRESSURE:
        return None
    found: Evidence = {"load": host.load, "cores": host.cores}
    if host.cpu_pressure is not None:
        found["cpu_waiting"] = host.cpu_pressure
    return found if host.memory_pressure is None else {**found, "memory_stalled": host.memory_pressure}
