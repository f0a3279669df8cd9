"""The flags of `powerband bench`, and what they mean: a Workload, its end, and how it is judged.

vLLM's and GuideLLM's spellings of common options are understood; they stand behind ours in `name=`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from powerband.errors import UsageError
from powerband.spec.quantities import number, seconds, share
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import MAX_RATE, Arrivals, ClosedLoop, OpenLoop, RatePhase, Replay
from powerband.spec.workload.lengths import parse_lengths
from powerband.spec.workload.presets import PRESETS, preset
from powerband.spec.workload.traces import FORMATS, read_trace
from powerband.spec.workload.workload import Conversation, RequestMix, RequestTrace, SharedPrefix, Workload

DEFAULT_DURATION_S = 60.0
DEFAULT_RATE = 1.0


def _flag(group: Group, *names: str, help: str) -> Parameter:
    return Parameter(name=names, help=help, group=group, negative="", show_default=False)


_load = partial(_flag, Group("Load: when requests arrive", sort_key=1))
_requests = partial(_flag, Group("Requests: what they are", sort_key=2))
_target = partial(_flag, Group("Server", sort_key=3))
_judging = partial(_flag, Group("Judging", sort_key=4))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LoadFlags:
    rate: Annotated[
        float | None,
        _load("--rate", "--request-rate", help="Requests a second, Poisson; inf: all at once"),
    ] = None
    concurrency: Annotated[
        int | None,
        _load("--concurrency", "--max-concurrency", help="Closed loop: so many users, each waits for answers"),
    ] = None
    burstiness: Annotated[
        float | None,
        _load("--burstiness", help="Shape of gamma gaps: 1 Poisson, < 1 burstier, inf constant"),
    ] = None
    ramp: Annotated[str | None, _load("--ramp", help="From rate to rate over the duration, e.g. 1-10")] = None
    steps: Annotated[str | None, _load("--steps", help="Rates one after the other, e.g. 1x30s,4x60s,1x30s")] = None
    trace: Annotated[Path | None, _load("--trace", help="Requests of a file, at its times")] = None
    trace_format: Annotated[
        Literal["auto", "azure", "mooncake", "sharegpt", "records"],
        _load("--trace-format", help=f"{', '.join(FORMATS)}; default: recognised"),
    ] = "auto"
    speedup: Annotated[float | None, _load("--speedup", help="Replay a trace so many times as fast")] = None
    duration: Annotated[
        str | None, _load("--duration", "--max-seconds", help="Arrivals end after this; default: 60s")
    ] = None
    requests: Annotated[
        int | None,
        _load("--requests", "--num-prompts", "--max-requests", help="... or after so many requests"),
    ] = None
    seed: Annotated[int, _load("--seed", help="The same seed is the same schedule; default: 0")] = 0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class MixFlags:
    workload: Annotated[str | None, _requests("--workload", help=f"{', '.join(PRESETS)}; default: chat")] = None
    prompt_tokens: Annotated[
        str | None,
        _requests(
            "--prompt-tokens",
            "--input-len",
            "--random-input-len",
            help="512, 128-1024, or lognormal:median=512,sigma=0.8",
        ),
    ] = None
    output_tokens: Annotated[
        str | None, _requests("--output-tokens", "--output-len", "--random-output-len", help="Likewise")
    ] = None
    prefix_tokens: Annotated[
        str | None,
        _requests("--prefix-tokens", "--random-prefix-len", help="What prompts begin with alike; 0: nothing"),
    ] = None
    prefix_groups: Annotated[int | None, _requests("--prefix-groups", help="How many such texts")] = None
    turns: Annotated[str | None, _requests("--turns", help="Of a conversation that waits for answers; 1: none")] = None
    think: Annotated[str | None, _requests("--think", help="Mean time from an answer to the next turn")] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RequestFlags(MixFlags):
    respect_eos: Annotated[
        bool, _requests("--respect-eos", help="Let the model end its answers; default: as long as asked")
    ] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TargetFlags:
    model: Annotated[str | None, _target("--model", help="Name in the API; default: the server's first")] = None
    endpoint: Annotated[str, _target("--endpoint", "--backend", help="completions (default) or chat")] = "completions"
    api_key: Annotated[str | None, _target("--api-key", help="Default: $POWERBAND_API_KEY, $OPENAI_API_KEY")] = None
    header: Annotated[
        list[str] | None, _target("--header", help="'Name: value', into every request; may be repeated")
    ] = None
    extra_body: Annotated[str | None, _target("--extra-body", help="JSON object, into every request's body")] = None
    insecure: Annotated[bool, _target("--insecure", help="Do not check the certificate")] = False
    wait: Annotated[str, _target("--wait", help="How long to wait for a server that is starting")] = "0s"
    timeout: Annotated[str, _target("--timeout", help="Of a request; default: 600s")] = "600s"
    workers: Annotated[int, _target("--workers", help="Processes of the client; default: 1")] = 1
    metrics_url: Annotated[
        str | None, _target("--metrics-url", help="Default: /metrics beside the API; 'none': do not ask")
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SLOFlags:
    slo: Annotated[
        str | None,
        _judging("--slo", "--goodput", help="Limits: ttft=500ms,tpot=50ms; also stall and e2e"),
    ] = None
    attainment: Annotated[
        str | None, _judging("--attainment", help="Share of requests that must keep it; default: 95%")
    ] = None
    warm_up: Annotated[str, _judging("--warm-up", help="Left out at the start; default: 10%")] = "10%"
    cool_down: Annotated[str, _judging("--cool-down", help="Left out at the end; default: 5%")] = "5%"

    def made(self) -> SLO | None:
        """Raises UsageError."""
        if self.slo is None:
            if self.attainment is not None:
                raise UsageError("--attainment means nothing without --slo.", param="attainment")
            return None
        slo = SLO.parse(self.slo)
        return slo if self.attainment is None else replace(slo, attainment=share(self.attainment, param="attainment"))

    def shares(self) -> tuple[float, float]:
        """Of warm-up and cool-down. Raises UsageError."""
        found = [share(text, param=name) if text.strip("0%. ") else 0.0 for name, text in self._texts().items()]
        if sum(found) >= 1:
            raise UsageError("Warm-up and cool-down leave nothing to measure.", param="warm_up")
        return found[0], found[1]

    def _texts(self) -> dict[str, str]:
        return {"warm-up": self.warm_up, "cool-down": self.cool_down}


@dataclass(frozen=True, slots=True)
class RequestedLoad:
    """What the flags say to send, and when it ends."""

    workload: Workload
    duration_s: float
    num_requests: int | None


def requested_load(load: LoadFlags, requests: MixFlags) -> RequestedLoad:
    """Raises UsageError for flags that contradict each other or mean nothing together."""
    duration_s = seconds(load.duration, param="duration") if load.duration is not None else math.inf
    if load.requests is not None and load.requests < 1:
        raise UsageError(f"requests is {load.requests}.", hint="It must be 1 or more.", param="requests")
    trace = read_trace(load.trace, format=load.trace_format) if load.trace is not None else None
    if trace is None and load.duration is None and load.requests is None:
        duration_s = DEFAULT_DURATION_S
    content, burstiness, name = _content(requests, trace)
    arrivals = _arrivals(load, trace, burstiness, duration_s)
    if (
        isinstance(arrivals, OpenLoop)
        and load.duration is None
        and math.isfinite(sum(p.seconds for p in arrivals.phases))
    ):
        duration_s = sum(phase.seconds for phase in arrivals.phases)
    workload = Workload(name=name, arrivals=arrivals, requests=content)
    return RequestedLoad(workload, duration_s, load.requests)


def _content(flags: MixFlags, trace: RequestTrace | None) -> tuple[RequestMix | RequestTrace, float, str]:
    """The requests, the burstiness that goes with them, and a name."""
    if trace is not None:
        given = [name for name in _MIX_OPTIONS if getattr(flags, name) is not None]
        if given:
            flag = given[0].replace("_", "-")
            raise UsageError(f"--{flag} means nothing with --trace.", hint="A trace says what its requests are.")
        return trace, 1.0, f"trace {trace.source['file']}"
    chosen = preset(flags.workload or "chat")
    mix = chosen.mix
    if flags.prompt_tokens is not None:
        mix = replace(mix, prompt=parse_lengths(flags.prompt_tokens, param="prompt-tokens"))
    if flags.output_tokens is not None:
        mix = replace(mix, output=parse_lengths(flags.output_tokens, param="output-tokens"))
    mix = replace(mix, prefix=_prefix(flags, mix.prefix), conversation=_conversation(flags, mix.conversation))
    name = flags.workload or "chat"
    return mix, chosen.burstiness, name if mix == chosen.mix else f"{name}, changed"


_MIX_OPTIONS = ("workload", "prompt_tokens", "output_tokens", "prefix_tokens", "prefix_groups", "turns", "think")


def _prefix(flags: MixFlags, known: SharedPrefix | None) -> SharedPrefix | None:
    if flags.prefix_tokens is not None:
        if flags.prefix_tokens.strip() == "0":
            known = None
        else:
            lengths = parse_lengths(flags.prefix_tokens, param="prefix-tokens")
            known = replace(known, tokens=lengths) if known is not None else SharedPrefix(lengths)
    if flags.prefix_groups is not None:
        if known is None:
            raise UsageError("--prefix-groups needs --prefix-tokens.", param="prefix_groups")
        known = replace(known, groups=flags.prefix_groups)
    return known


def _conversation(flags: MixFlags, known: Conversation | None) -> Conversation | None:
    if flags.turns is not None:
        if flags.turns.strip() == "1":
            known = None
        else:
            lengths = parse_lengths(flags.turns, param="turns")
            known = replace(known, turns=lengths) if known is not None else Conversation(lengths)
    if flags.think is not None:
        if known is None:
            raise UsageError("--think needs --turns.", param="think")
        known = replace(known, think_s=seconds(flags.think, param="think"))
    return known


def _arrivals(load: LoadFlags, trace: RequestTrace | None, burstiness: float, duration_s: float) -> Arrivals:
    ways = {"rate": load.rate, "concurrency": load.concurrency, "ramp": load.ramp, "steps": load.steps}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"--{given[0]} and --{given[1]} contradict each other.", param=given[1])
    if load.speedup is not None and (trace is None or given):
        raise UsageError("--speedup is for a trace at its own times.", param="speedup")
    burstiness = load.burstiness if load.burstiness is not None else burstiness
    if load.burstiness is not None and (load.concurrency is not None or (trace is not None and not given)):
        raise UsageError("--burstiness needs an open loop at a rate.", param="burstiness")
    if load.concurrency is not None:
        return ClosedLoop(load.concurrency)
    if load.ramp is not None:
        if math.isinf(duration_s):
            raise UsageError("--ramp needs a --duration.", param="ramp")
        start, end = _pair(load.ramp, "-", "ramp", "1-10")
        return OpenLoop(
            (RatePhase(number(start, param="ramp", low=-1), number(end, param="ramp", low=-1), duration_s),), burstiness
        )
    if load.steps is not None:
        pairs = [_pair(step, "x", "steps", "1x30s,4x60s") for step in load.steps.split(",")]
        phases = [(number(rate, param="steps", low=-1), seconds(length, param="steps")) for rate, length in pairs]
        return OpenLoop(tuple(RatePhase(rate, rate, length_s) for rate, length_s in phases), burstiness)
    if trace is not None and load.rate is None:
        if trace.source["format"] == "sharegpt":
            raise UsageError("A ShareGPT trace has no times.", hint="Give --rate or --concurrency.", param="trace")
        return Replay(load.speedup or 1.0)
    rate = DEFAULT_RATE if load.rate is None else load.rate
    return OpenLoop.at(MAX_RATE if math.isinf(rate) else rate, burstiness)


def _pair(text: str, sign: str, param: str, example: str) -> tuple[str, str]:
    first, found, second = text.partition(sign)
    if not found:
        raise UsageError(f"{param} is '{text}'.", hint=f"Write it like {example}.", param=param)
    return first, second
