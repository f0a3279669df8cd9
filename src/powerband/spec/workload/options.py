"""A load as users write it (`--rate 4 --prompt-tokens 128-1024`), and the Workload that it means.

Each option is declared here once; commands make flags of them. vLLM's and GuideLLM's spellings follow ours in `names`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from powerband.errors import UsageError
from powerband.spec.config_reader import shown
from powerband.spec.quantities import number, seconds
from powerband.spec.workload.arrivals import (
    MAX_CONCURRENCY,
    MAX_RATE,
    Arrivals,
    ClosedLoop,
    OpenLoop,
    RatePhase,
    Replay,
)
from powerband.spec.workload.lengths import parse_lengths
from powerband.spec.workload.presets import PRESETS, preset
from powerband.spec.workload.traces import FORMATS, read_trace
from powerband.spec.workload.workload import (
    Conversation,
    RequestMix,
    RequestTrace,
    SharedPrefix,
    Workload,
    read_workload,
)

DEFAULT_DURATION_S = 60.0
DEFAULT_RATE = 1.0


def option(default: Any, help: str, *names: str) -> Any:
    """A field that commands make a flag of. names: of the flag; default: as the field."""
    return field(default=default, metadata={"help": help, "names": names})


@dataclass(frozen=True, kw_only=True)
class ArrivalOptions:
    rate: float | None = option(None, "Requests per second, Poisson; inf: all at once", "--rate", "--request-rate")
    concurrency: int | None = option(
        None, "Number of users who each wait for their answers (closed loop)", "--concurrency", "--max-concurrency"
    )
    burstiness: float | None = option(None, "Shape of gamma gaps: 1 Poisson, < 1 burstier, inf constant")
    ramp: str | None = option(None, "From rate to rate over the duration, e.g. 1-10")
    steps: str | None = option(None, "Rates one after the other, e.g. 1x30s,4x60s,1x30s")
    trace: Path | None = option(None, "Replay the requests of a file at its times")  # noqa: RUF009 (a Path is immutable)
    trace_format: Literal["auto", "azure", "mooncake", "sharegpt", "records"] = option(
        "auto", f"{', '.join(FORMATS)}; default: recognised"
    )
    speedup: float | None = option(None, "Replay a trace this many times as fast")
    duration: str | None = option(None, "Arrivals end after this; default: 60s", "--duration", "--max-seconds")
    requests: int | None = option(
        None, "... or after this many requests", "--requests", "--num-prompts", "--max-requests"
    )
    seed: int = option(0, "The same seed gives the same schedule; default: 0")


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    workload: str | None = option(None, f"{', '.join(PRESETS)}; default: chat")
    prompt_tokens: str | None = option(
        None,
        "Of each request, behind the shared prefix: 512, 128-1024, or lognormal:median=512,sigma=0.8",
        *("--prompt-tokens", "--input-len", "--random-input-len"),
    )
    output_tokens: str | None = option(
        None, "In the same form", "--output-tokens", "--output-len", "--random-output-len"
    )
    prefix_tokens: str | None = option(
        None,
        "Length of the prefix that prompts share, before their own tokens; 0: none",
        "--prefix-tokens",
        "--random-prefix-len",
    )
    prefix_groups: int | None = option(None, "Number of different prefixes")
    turns: str | None = option(None, "Turns of a conversation, each sent after the answer before; 1: single requests")
    think: str | None = option(None, "Mean time from an answer to the next turn")
    strict_lengths: bool = option(False, "Refuse requests longer than the model's context; default: cut them to fit it")


@dataclass(frozen=True, slots=True)
class RequestedLoad:
    """What to send, and when it ends."""

    workload: Workload
    duration_s: float
    num_requests: int | None


def requested_load(load: ArrivalOptions, requests: MixOptions) -> RequestedLoad:
    """Raises UsageError for options that contradict each other or have no effect together."""
    duration_s = seconds(load.duration, param="duration") if load.duration is not None else math.inf
    if load.requests is not None and load.requests < 1:
        raise UsageError(f"--requests is {load.requests}; it must be 1 or more.", param="requests")
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


def _content(flags: MixOptions, trace: RequestTrace | None) -> tuple[RequestMix | RequestTrace, float, str]:
    """The requests, the burstiness that goes with them, and a name."""
    if trace is not None:
        given = _chosen(flags)
        if given:
            flag = given[0].replace("_", "-")
            raise UsageError(f"--{flag} has no effect with --trace.", hint="A trace has its own requests.")
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


def _chosen(flags: MixOptions) -> list[str]:
    """Names of the options that say what requests are; the others say how to send them."""
    return [item.name for item in fields(MixOptions) if item.default is None and getattr(flags, item.name) is not None]


def has_requests(flags: MixOptions) -> bool:
    """Whether they say anything of what requests are."""
    return bool(_chosen(flags))


def _prefix(flags: MixOptions, known: SharedPrefix | None) -> SharedPrefix | None:
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


def _conversation(flags: MixOptions, known: Conversation | None) -> Conversation | None:
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


def _arrivals(load: ArrivalOptions, trace: RequestTrace | None, burstiness: float, duration_s: float) -> Arrivals:
    if load.rate == math.inf and load.concurrency is not None:  # vLLM's way to say a closed loop
        load = replace(load, rate=None)
    ways = {"rate": load.rate, "concurrency": load.concurrency, "ramp": load.ramp, "steps": load.steps}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"--{given[0]} and --{given[1]} contradict each other.", param=given[1])
    if load.rate != math.inf:  # vLLM's way to say: as fast as possible
        check_rate(load.rate)
    if load.concurrency is not None and not 1 <= load.concurrency <= MAX_CONCURRENCY:
        limit = f"it must be between 1 and {MAX_CONCURRENCY}"
        raise UsageError(f"--concurrency is {load.concurrency}; {limit}.", param="concurrency")
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


def check_rate(rate: float | None) -> None:
    """Raises UsageError unless it is None or a number of requests a second that can be sent."""
    if rate is not None and not 0 < rate <= MAX_RATE:
        limit = f"it must be above 0 and at most {MAX_RATE:g}"
        raise UsageError(f"--rate is {rate:g}; {limit}.", hint="Requests a second, like 8.", param="rate")


def _pair(text: str, sign: str, param: str, example: str) -> tuple[str, str]:
    first, found, second = text.partition(sign)
    if not found:
        raise UsageError(f"{param} is '{text}'.", hint=f"Write it like {example}.", param=param)
    return first, second


def chosen_workload(requests: MixOptions, *, rate: float | None) -> tuple[Workload, float]:
    """A preset, a workload in YAML or a trace, and its rate: the given one, else its own.

    Raises UsageError or EnvironmentFault.
    """
    check_rate(rate)
    text = requests.workload or "chat"
    path = Path(text)
    if text in PRESETS:
        if rate is None:
            raise UsageError("How many requests a second?", hint="Like: --rate 8.", param="rate")
        asked = requested_load(ArrivalOptions(rate=rate), requests)
        return asked.workload, rate
    if path.suffix in (".yaml", ".yml"):
        if has_requests(replace(requests, workload=None)):
            raise UsageError(
                f"{text} already describes the requests.", hint="Change it in that file.", param="workload"
            )
        workload = read_workload(path)
    elif path.exists():
        workload = requested_load(ArrivalOptions(trace=path, rate=rate), replace(requests, workload=None)).workload
    else:
        raise UsageError(
            f"There is no workload {shown(text)}, and no such file.",
            hint=f"Presets: {', '.join(PRESETS)}; or a trace, or a workload in YAML.",
            param="workload",
        )
    own = workload.mean_rate()
    if rate is None and own is None:
        raise UsageError(f"{text} has no rate of its own.", hint="Like: --rate 8.", param="rate")
    return workload, rate if rate is not None else own or 0.0
