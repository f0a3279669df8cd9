"""What users send: when requests arrive, how long they are, what they share, and whether they wait for answers.

A Workload describes it; a Schedule is one drawing of it: every request with its time, its lengths and the text it
shares with others, the same for the same seed wherever it is drawn. The load generator sends a schedule, the simulator
plays it.

    Workload ── draw(seed) ──► Schedule: chains of requests
                                 chain    starts at a time of its own
                                 request  the first at the chain's start; each other after the answer before it
                                 segment  a piece of its prompt; the same key is the same text
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal

from powerband.documents import read_table
from powerband.errors import UsageError
from powerband.spec.config_reader import shown
from powerband.spec.workload.arrivals import (
    Arrivals,
    ClosedLoop,
    OpenLoop,
    Replay,
    arrivals_as_dict,
    arrivals_from_dict,
)
from powerband.spec.workload.fitting import MIN_MODEL_LEN, fit_chains
from powerband.spec.workload.lengths import Lengths, lengths_as_dict, lengths_from_dict
from powerband.spec.workload.schedule import Chain, PlannedRequest, Schedule, Segment

MAX_REQUESTS = 2_000_000
MAX_TURNS = 1000
# Of a closed loop that only a duration ends: more than its users will get answered.
_OPEN_ENDED, _OPEN_ENDED_EACH = 20_000, 200


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Texts that prompts begin with."""

    tokens: Lengths
    groups: int = 1  # number of different texts
    share: float = 1.0  # fraction of requests that begin with one
    skew: float = 0.0  # 0: all groups alike; else group g has a weight of g^-skew (Zipf's law)

    def __post_init__(self) -> None:
        is_whole = isinstance(self.groups, int) and not isinstance(self.groups, bool)
        if not (is_whole and 1 <= self.groups <= 1_000_000 and 0 < self.share <= 1 and 0 <= self.skew <= 10):
            raise UsageError(
                f"A shared prefix: groups {shown(self.groups)}, share {shown(self.share)}, skew {shown(self.skew)}.",
                hint="1 to 1000000 groups, a share above 0 and up to 1, a skew from 0 to 10.",
                param="prefix",
            )


@dataclass(frozen=True, slots=True)
class Conversation:
    """Requests that wait for each other's answers."""

    turns: Lengths
    think_s: float = 0.0  # mean time from an answer to the next turn (exponential)

    def __post_init__(self) -> None:
        if not 0 <= self.think_s < math.inf:
            raise UsageError(f"think_s is {shown(self.think_s)}.", hint="It is 0 or more.", param="think_s")
        if self.turns.maximum > MAX_TURNS:
            raise UsageError(
                f"A conversation of up to {self.turns.maximum} turns.",
                hint=f"At most {MAX_TURNS}.",
                param="turns",
            )


AnswerForm = Literal["text", "tools", "structured"]
_FORMS = ("text", "tools", "structured")


@dataclass(frozen=True, slots=True)
class RequestMix:
    """Requests drawn from distributions. form: of the answers; tools and structured ones end by themselves."""

    prompt: Lengths  # tokens of a request or turn, beyond a shared prefix
    output: Lengths
    prefix: SharedPrefix | None = None
    conversation: Conversation | None = None
    form: AnswerForm = "text"

    def __post_init__(self) -> None:
        if self.form not in _FORMS:
            hint = f"It is one of {', '.join(_FORMS)}."
            raise UsageError(f"The form of answers is {shown(self.form)}.", hint=hint, param="form")


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request of a trace."""

    time_s: float  # from the trace's start
    segments: tuple[Segment, ...]
    output_tokens: int
    conversation: str | None = None  # requests with the same one wait for each other's answers


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """Recorded requests, by time."""

    source: Mapping[str, str]  # the file's name, format and SHA-256
    requests: tuple[TracedRequest, ...]

    def __post_init__(self) -> None:
        if not self.requests:
            raise UsageError(f"The trace {self.source.get('file', '')} has no requests.", param="trace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Raises UsageError for parts that do not go together."""

    name: str
    arrivals: Arrivals
    requests: RequestMix | RequestTrace
    max_model_len: int | None = None  # tokens of prompt and output together: longer requests are cut; None: no limit

    def __post_init__(self) -> None:
        length = self.max_model_len
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < MIN_MODEL_LEN):
            raise UsageError(
                f"max_model_len is {shown(length)}.", hint=f"It is {MIN_MODEL_LEN} or more.", param="max_model_len"
            )
        if not isinstance(self.arrivals, Replay):
            return
        if isinstance(self.requests, RequestMix):
            raise UsageError("Only a trace can be replayed.", hint="Name one with --trace.", param="arrivals")
        if len(self.requests.requests) > 1 and self.requests.requests[-1].time_s == 0:
            raise UsageError(
                f"The trace {self.requests.source.get('file', '')} has no times.",
                hint="Give --rate or --concurrency.",
                param="trace",
            )

    @property
    def constrains_answers(self) -> bool:
        """Whether engines let the model choose only tokens of a grammar: a schema's, or that of tool calls."""
        return isinstance(self.requests, RequestMix) and self.requests.form != "text"

    def within(self, max_model_len: int | None) -> Workload:
        """With requests cut to fit this context, too; None: a context that is not known."""
        if max_model_len is None or (self.max_model_len is not None and self.max_model_len <= max_model_len):
            return self
        return replace(self, max_model_len=max_model_len)

    def draw(self, seed: int, *, duration_s: float = math.inf, num_requests: int | None = None) -> Schedule:
        """One schedule of at most `num_requests` requests that arrive before `duration_s`, cut to `max_model_len`.

        Raises UsageError when nothing would end it, or when not one request falls into it.
        """
        if num_requests is None and math.isinf(duration_s) and not isinstance(self.requests, RequestTrace):
            raise UsageError("Nothing ends this load.", hint="Give a duration or a number of requests.")
        if not duration_s > 0:
            raise UsageError(f"The load lasts {duration_s:g} s.", hint="It must be above 0.", param="duration")
        if num_requests is not None and not 1 <= num_requests <= MAX_REQUESTS:
            raise UsageError(f"{num_requests} requests.", hint=f"1 to {MAX_REQUESTS}.", param="requests")
        max_requests = num_requests or MAX_REQUESTS + 1
        if isinstance(self.arrivals, ClosedLoop):
            if num_requests is None and isinstance(self.requests, RequestMix):
                max_requests = min(MAX_REQUESTS, max(_OPEN_ENDED, _OPEN_ENDED_EACH * self.arrivals.concurrency))
            chains = _users(self.arrivals, self._conversations(seed), max_requests, seed)
        else:
            chains = _on_time(self._starts(seed, duration_s), self._conversations(seed), max_requests)
        cut = None
        if self.max_model_len is not None:
            chains, cut = fit_chains(chains, self.max_model_len)
        schedule = Schedule(seed, tuple(chains), duration_s, cut)
        if not chains:
            raise UsageError(f"No request arrives within {duration_s:g} s.", hint="Raise the rate or the duration.")
        if schedule.num_requests > MAX_REQUESTS:
            raise UsageError(f"More than {MAX_REQUESTS} requests.", hint="Lower the rate or the duration.")
        return schedule

    def mean_rate(self) -> float | None:
        """Arrivals a second over the whole load; None: as many as there are answers (a closed loop)."""
        match self.arrivals, self.requests:
            case OpenLoop(phases), _:
                steady = phases[-1] if math.isinf(phases[-1].seconds) else None
                if steady is not None:
                    return steady.start
                return sum(phase.arrivals for phase in phases) / sum(phase.seconds for phase in phases)
            case Replay(speedup), RequestTrace() as trace:
                last_s = trace.requests[-1].time_s
                return len(_by_conversation(trace)) / last_s * speedup if last_s else None
        return None

    def _starts(self, seed: int, duration_s: float) -> Iterator[float]:
        match self.arrivals, self.requests:
            case OpenLoop() as arrivals, _:
                times = arrivals.times(_stream(seed, "arrivals"))
            case Replay(speedup), RequestTrace() as trace:
                times = (group[0].time_s / speedup for group in _by_conversation(trace))
            case _:
                raise AssertionError("checked in __post_init__, and in draw")
        for time_s in times:
            if time_s >= duration_s:
                return
            yield time_s

    def _conversations(self, seed: int) -> Iterator[list[PlannedRequest]]:
        if isinstance(self.requests, RequestMix):
            return _drawn(self.requests, seed)
        return _traced(self.requests)

    def as_dict(self) -> dict[str, Any]:
        """For files. A trace is named, not copied."""
        requests = (
            mix_as_dict(self.requests)
            if isinstance(self.requests, RequestMix)
            else {"trace": dict(self.requests.source)}
        )
        values = {"name": self.name, "arrivals": arrivals_as_dict(self.arrivals), "requests": requests}
        return values if self.max_model_len is None else {**values, "max_model_len": self.max_model_len}

    @classmethod
    def from_dict(cls, values: Any, trace: RequestTrace | None = None) -> Workload:
        """The inverse of `as_dict`. trace: where one is named, it, read again. Raises UsageError."""
        try:
            _only(values, ("name", "arrivals", "requests", "max_model_len"))
            requests = values["requests"]
            return cls(
                name=str(values["name"]),
                arrivals=arrivals_from_dict(values["arrivals"]),
                requests=_same_trace(requests["trace"], trace) if "trace" in requests else mix_from_dict(requests),
                max_model_len=values.get("max_model_len"),
            )
        except KeyError as problem:
            raise UsageError(f"This is not a valid workload: it has no {problem}.", param="workload") from None
        except (TypeError, AttributeError, ValueError, OverflowError) as problem:
            raise UsageError(f"This is not a valid workload: {str(problem)[:200]}.", param="workload") from None


def _same_trace(source: Mapping[str, str], trace: RequestTrace | None) -> RequestTrace:
    """The trace that was read, if it is the one that is meant."""
    if trace is None:
        raise UsageError(f"The workload is the trace {source['file']}.", hint="Name it with --trace.", param="trace")
    if trace.source["sha256"] != source["sha256"]:
        raise UsageError(
            f"{trace.source['file']} is not the trace of this workload: its SHA-256 differs.",
            hint=f"It was made with {source['file']}.",
            param="trace",
        )
    return trace


def mix_as_dict(mix: RequestMix) -> dict[str, Any]:
    made: dict[str, Any] = {"prompt": lengths_as_dict(mix.prompt), "output": lengths_as_dict(mix.output)}
    if mix.prefix is not None:
        made["prefix"] = {**asdict(mix.prefix), "tokens": lengths_as_dict(mix.prefix.tokens)}
    if mix.conversation is not None:
        made["conversation"] = {**asdict(mix.conversation), "turns": lengths_as_dict(mix.conversation.turns)}
    return made if mix.form == "text" else {**made, "form": mix.form}


def mix_from_dict(values: Mapping[str, Any]) -> RequestMix:
    """The inverse. Raises UsageError, and KeyError, ValueError or TypeError for what is missing, unknown or wrong."""
    _only(values, ("prompt", "output", "prefix", "conversation", "form"))
    prefix, conversation = values.get("prefix"), values.get("conversation")
    if prefix is not None:
        prefix = SharedPrefix(**{**prefix, "tokens": lengths_from_dict(prefix["tokens"], param="prefix")})
    if conversation is not None:
        turns = lengths_from_dict(conversation["turns"], param="turns")
        conversation = Conversation(**{**conversation, "turns": turns})
    prompt, output = (lengths_from_dict(values[name], param=name) for name in ("prompt", "output"))
    return RequestMix(prompt, output, prefix, conversation, values.get("form", "text"))


def _only(values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Unknown keys are mistakes."""
    unknown = [str(name) for name in values if name not in known]
    if unknown:
        raise ValueError(f"{shown(unknown[0])} is none of {', '.join(known)}")


def _stream(seed: int, purpose: str) -> random.Random:
    """Random numbers for one purpose, so that a change of one does not move the others."""
    return random.Random(f"{seed}/{purpose}")  # noqa: S311 (no secret)


def _drawn(mix: RequestMix, seed: int) -> Iterator[list[PlannedRequest]]:
    """Conversations without end, of one request each where the mix has none."""
    prompts, outputs, turns, thinking = (_stream(seed, name) for name in ("prompts", "outputs", "turns", "thinking"))
    prefixes = _prefixes(mix.prefix, seed) if mix.prefix is not None else None
    talk, index = mix.conversation, 0
    while True:
        made: list[PlannedRequest] = []
        for turn in range(talk.turns.draw(turns) if talk is not None else 1):
            shared = next(prefixes) if prefixes is not None and turn == 0 else ()
            own = Segment(f"{seed}/{index}", mix.prompt.draw(prompts))
            think_s = thinking.expovariate(1 / talk.think_s) if turn and talk is not None and talk.think_s else 0.0
            made.append(PlannedRequest(index, (*shared, own), mix.output.draw(outputs), turn, think_s))
            index += 1
        yield made


def _prefixes(prefix: SharedPrefix, seed: int) -> Iterator[tuple[Segment, ...]]:
    lengths, choices = _stream(seed, "prefix lengths"), _stream(seed, "prefixes")
    texts = [Segment(f"{seed}/prefix {group}", prefix.tokens.draw(lengths)) for group in range(prefix.groups)]
    cumulative = list(accumulate((group + 1) ** -prefix.skew for group in range(prefix.groups)))
    while True:
        has_one = choices.random() < prefix.share
        chosen = bisect_right(cumulative, choices.random() * cumulative[-1], hi=prefix.groups - 1)
        yield (texts[chosen],) if has_one else ()


def _traced(trace: RequestTrace) -> Iterator[list[PlannedRequest]]:
    """Its conversations, in the order of their first requests. How long people thought between turns is in no trace."""
    first = 0
    for group in _by_conversation(trace):
        yield [PlannedRequest(first + turn, r.segments, r.output_tokens, turn) for turn, r in enumerate(group)]
        first += len(group)


def _by_conversation(trace: RequestTrace) -> list[list[TracedRequest]]:
    groups: dict[Any, list[TracedRequest]] = {}
    for index, request in enumerate(trace.requests):
        groups.setdefault(index if request.conversation is None else request.conversation, []).append(request)
    return list(groups.values())


def _on_time(starts: Iterable[float], conversations: Iterable[list[PlannedRequest]], max_requests: int) -> list[Chain]:
    """A chain for each conversation, with `max_requests` requests in all."""
    chains, left = [], max_requests
    for start_s, requests in zip(starts, conversations, strict=False):
        if left <= 0:
            break
        chains.append(Chain(start_s, tuple(requests[:left])))
        left -= len(requests)
    return chains


def _users(
    loop: ClosedLoop, conversations: Iterator[list[PlannedRequest]], max_requests: int, seed: int
) -> list[Chain]:
    """A chain for each user, who takes every `concurrency`-th conversation."""
    taken: list[list[PlannedRequest]] = [[] for _ in range(loop.concurrency)]
    left = max_requests
    for number, requests in enumerate(islice(conversations, max_requests)):
        if left <= 0:
            break
        taken[number % loop.concurrency] += requests[:left]
        left -= len(requests)
    if loop.think_s:
        thinking = _stream(seed, "users")
        taken = [[_after(request, thinking.expovariate(1 / loop.think_s)) for request in user] for user in taken]
    return [Chain(0.0, tuple(user)) for user in taken if user]


def _after(request: PlannedRequest, think_s: float) -> PlannedRequest:
    """With the time that its user takes; within a conversation that is said already."""
    return request if request.turn else replace(request, think_s=think_s)


def read_workload(path: Path) -> Workload:
    """A workload in YAML. Raises UsageError or EnvironmentFault."""
    values = read_table(path, "workload", param="workload")
    if "trace" in (values.get("requests") or ()):
        raise UsageError(f"{path} names a trace.", hint="Give that: --workload TRACE.", param="workload")
    return Workload.from_dict(values)
