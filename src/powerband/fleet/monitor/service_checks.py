"""What is wrong with the service as a whole: the promise is broken or about to be, and by what; its model is off."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from powerband.fleet.monitor.incidents import SERVICE, ActionKind, Cause, Finding
from powerband.fleet.monitor.state import RECENT_S, MonitorState
from powerband.metrics.record import Outcome

_GATEWAY_AWAY_S = 5.0
_MARGIN = 1.1  # of the plan's rate
_FEWEST_S = 10.0
_FEWEST_ANSWERS = 20
_CACHE_LOST = 0.6  # of the usual share of prompts that was cached
_CACHE_MATTERS = 0.1
_MIX_CHANGED = 1.5
_BUSY, _STALLED, _LITTLE_MEMORY = 0.4, 0.1, 0.03


def check_service(scene: MonitorState, replicas: Sequence[Finding]) -> Iterator[Finding]:
    """replicas: what was found of single ones, which may be behind it."""
    if (broken := _promise(scene, replicas)) is not None:
        yield broken
    yield from _model(scene)
    yield from _memory(scene)
    if scene.gateway_away_s is not None and scene.clock_s - scene.gateway_away_s >= _GATEWAY_AWAY_S:
        away_s = scene.clock_s - scene.gateway_away_s
        yield Finding(
            kind="gateway",
            subject=SERVICE,
            cause="down",
            what=f"The gateway has not answered for {away_s:.0f} s.",
            evidence={"away_s": away_s},
            advice="Look at its log. The controller starts another one when it is gone.",
        )


def _promise(scene: MonitorState, replicas: Sequence[Finding]) -> Finding | None:
    """Misses burn the budget too fast, or more comes than the plan is made for and it begins to show."""
    alert = scene.attainment.alert(scene.clock_s)
    overload = _overload(scene)
    if alert is None and overload is None:
        return None
    promised = scene.expected.slo.attainment
    evidence: dict[str, float | str] = {"promised_attainment": promised}
    if alert is not None:
        share = scene.attainment.over(scene.clock_s, alert.long_s)
        attained = share.attainment or 0.0
        what = f"{attained:.1%} of {share.total} requests kept the SLO in {alert.long_s} s; {promised:.1%} is promised."
        reasons = scene.attainment.misses(scene.clock_s, alert.long_s)
        evidence |= {
            "attainment": attained,
            "window_s": alert.long_s,
            "burn": scene.attainment.burn(scene.clock_s, alert.long_s) or 0.0,
            "missed": ", ".join(f"{name} {count}" for name, count in reasons.items()),
        }
    else:
        what = "The service gets more than its plan is made for, and requests begin to wait or to be refused."
    finding = Finding(kind="promise", subject=SERVICE, cause="unknown", what=what, evidence=evidence)
    return _explained(scene, finding, replicas, overload)


def _explained(
    scene: MonitorState, finding: Finding, replicas: Sequence[Finding], overload: dict[str, float | str] | None
) -> Finding:
    """With the likeliest cause and what to do about it."""
    order: list[Cause] = ["hang", "errors", "down", "slow_replica"]
    load = _by_load(overload)
    if load is not None and "planned_rate" in load.evidence:
        # Nothing was promised for so much, and replicas that fail under it are no reason of their own.
        return _explain(finding, load)
    culprits = sorted((one for one in replicas if one.cause in order), key=lambda one: order.index(one.cause))
    if culprits:
        one = culprits[0]
        evidence = {**finding.evidence, **one.evidence, "replica": one.subject}
        # The replica's own incident acts; this one says why.
        return replace(
            finding, cause=one.cause, what=f"{finding.what} {one.what}", evidence=evidence, advice=one.advice
        )
    for why in (load, _by_cache(scene), _by_mix(scene), _by_host(scene), _by_model(scene)):
        if why is not None:
            return _explain(finding, why)
    return replace(finding, action="replan", advice="Compare /metrics with the plan; plan anew.")


def _explain(finding: Finding, why: _Explanation) -> Finding:
    return replace(
        finding,
        cause=why.cause,
        what=f"{finding.what} {why.what}",
        evidence={**finding.evidence, **why.evidence},
        action=why.action,
        advice=why.advice,
    )


@dataclass(frozen=True, slots=True)
class _Explanation:
    cause: Cause
    what: str
    evidence: dict[str, float | str]
    action: ActionKind
    advice: str


def _by_load(overload: dict[str, float | str] | None) -> _Explanation | None:
    if overload is None:
        return None
    what = f"It is load beyond the plan: {overload['rate']:.2f} requests/s"
    what += f", planned for {overload['planned_rate']:.2f}." if "planned_rate" in overload else "."
    return _Explanation("load", what, overload, "add_replica", "Add a replica, or plan anew for this load.")


def _by_cache(scene: MonitorState) -> _Explanation | None:
    usual = scene.usual.get("cached_share", 0.0)
    share = scene.lately.figures(scene.clock_s, RECENT_S).get("cached_share")
    if share is None or usual < _CACHE_MATTERS or share > _CACHE_LOST * usual:
        return None
    what = f"Of prompts, {share:.0%} came from the cache, not the usual {usual:.0%}."
    advice = "See whether prompts still begin alike and are routed by their prefix; plan anew without it."
    return _Explanation("cache", what, {"cached_share": share, "usual_cached_share": usual}, "replan", advice)


def _by_mix(scene: MonitorState) -> _Explanation | None:
    told = scene.lately.figures(scene.clock_s, RECENT_S)
    changed: dict[str, float | str] = {}
    if told["answered"] < _FEWEST_ANSWERS:
        return None
    for name in ("prompt_tokens", "output_tokens"):
        usual = scene.usual.get(name, 0.0)
        if usual > 0 and told.get(name, 0.0) > _MIX_CHANGED * usual:
            changed |= {name: told[name], f"usual_{name}": usual}
    return (
        _Explanation("mix", "Requests are larger than usual.", changed, "replan", "Plan for these.")
        if changed
        else None
    )


def _by_host(scene: MonitorState) -> _Explanation | None:
    pressure = host_pressure(scene)
    if pressure is None:
        return None
    advice = "Move other work off this machine, or plan for what is left of it."
    return _Explanation("host", "The machine is short of processor time or memory.", pressure, "replan", advice)


def _by_model(scene: MonitorState) -> _Explanation | None:
    ratio = scene.residuals.model(scene.clock_s)
    if ratio is None:
        return None
    what = f"Steps take {ratio:.2f} times as long as predicted, at all replicas."
    return _Explanation("model", what, {"ratio": ratio}, "replan", "Calibrate and plan anew.")


def _overload(scene: MonitorState) -> dict[str, float | str] | None:
    """More comes than is planned for (than chance explains), and it shows. Without a plan's rate: it shows."""
    clock_s, expected = scene.clock_s, scene.expected
    count, seconds = scene.lately.arrivals(clock_s, RECENT_S)
    if seconds < _FEWEST_S or not count:
        return None
    if expected.rate is not None:
        planned = expected.rate * seconds
        if count <= _MARGIN * planned + 3 * math.sqrt(planned):
            return None
    refused = sum(
        seen.outcome is Outcome.REFUSED and seen.status == 503 for seen in scene.lately.within(clock_s, _FEWEST_S)
    )
    wait_s = max((pool.predicted_wait_s for pool in scene.pools), default=0.0)
    attained = scene.attainment.over(clock_s, RECENT_S).attainment
    is_late = wait_s > (expected.slo.ttft_s or math.inf) / 2
    is_missing = attained is not None and attained < expected.slo.attainment and expected.rate is not None
    if not (refused > scene.attainment.budget * count / 3 or is_late or is_missing):
        return None
    told: dict[str, float | str] = {
        "rate": count / seconds,
        "queued": sum(pool.queued for pool in scene.pools),
        "refused": refused,
        "predicted_wait_s": wait_s,
    }
    return told if expected.rate is None else {**told, "planned_rate": expected.rate}


def host_pressure(scene: MonitorState) -> dict[str, float | str] | None:
    """None when the machine has room."""
    host = scene.host
    if host is None:
        return None
    is_busy = host.load > 2 * host.cores or (host.cpu_waiting or 0.0) > _BUSY
    if not is_busy and (host.memory_stalled or 0.0) <= _STALLED:
        return None
    told: dict[str, float | str] = {"load": host.load, "cores": host.cores}
    if host.cpu_waiting is not None:
        told["cpu_waiting"] = host.cpu_waiting
    return told if host.memory_stalled is None else {**told, "memory_stalled": host.memory_stalled}


def _model(scene: MonitorState) -> Iterator[Finding]:
    ratio = scene.residuals.model(scene.clock_s)
    if ratio is None:
        return
    pressure = host_pressure(scene)
    yield Finding(
        kind="model",
        subject=SERVICE,
        cause="host" if pressure else "model",
        what=f"Steps take {ratio:.2f} times as long as the latency model predicts, at all replicas.",
        evidence={"ratio": ratio, **(pressure or {})},
        action="replan",
        advice="Move other work off this machine." if pressure else "Calibrate and plan anew: predictions do not hold.",
    )


def _memory(scene: MonitorState) -> Iterator[Finding]:
    host = scene.host
    if host is None or not host.memory_bytes:
        return
    left = host.memory_available_bytes / host.memory_bytes
    if left < _LITTLE_MEMORY:
        yield Finding(
            kind="host",
            subject=SERVICE,
            cause="memory",
            what=f"The machine has {host.memory_available_bytes / 2**30:.2f} GiB of memory left ({left:.1%}).",
            evidence={"available_bytes": host.memory_available_bytes, "memory_bytes": host.memory_bytes},
            advice="End other work, or give each replica less KV cache.",
        )
