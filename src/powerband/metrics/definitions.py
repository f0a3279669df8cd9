"""The definition of every latency figure, in one place: for `powerband bench --explain-metrics` and for reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Definition:
    """elsewhere: the same figure's name in other tools, or what they call differently."""

    name: str
    formula: str
    note: str
    elsewhere: str = ""


PREAMBLE = (
    "Times on one monotonic clock: s scheduled arrival, a request handed to the socket, c_1 … c_m arrival of the "
    "chunks that carry at least one token, k_i tokens in chunk i, n output tokens."
)
PERCENTILES = (
    "Percentiles come from the raw records, linear between neighbours; p99 needs 500 samples, p95 100, p90 50."
)
DEFINITIONS = (
    Definition(
        "send lag",
        "a − s",
        "The client's honesty: a run whose p99 exceeds max(5 ms, 1 % of median TTFT) is INVALID.",
        "inference-perf: schedule_delay",
    ),
    Definition(
        "TTFT",
        "c_1 − s",
        "Time to first token, as a user feels it: a client or server that falls behind cannot hide it (coordinated "
        "omission). Verdicts use this one.",
    ),
    Definition(
        "service TTFT", "c_1 − a", "From sending, without the client's lag.", "vLLM, SGLang, GuideLLM, AIPerf: TTFT"
    ),
    Definition(
        "TPOT",
        "(c_m − c_1) / (n − 1)",
        "Time per output token after the first, one per request, for n ≥ 2; a limit on it is met when n ≤ 1.",
        "vLLM: TPOT; AIPerf, GuideLLM: ITL. SGLang's TPOT ends with the stream, GuideLLM's is E2E / n",
    ),
    Definition(
        "ITL",
        "each gap c_i − c_(i−1) counts as k_i samples of gap / k_i",
        "Inter-token latency, pooled over requests: right also where a chunk carries several tokens.",
        "vLLM's and SGLang's ITL are gaps between chunks",
    ),
    Definition("stall", "max (c_i − c_(i−1))", "The longest pause within a request."),
    Definition("E2E", "c_m − s", "End to end.", "vLLM: E2EL, from sending"),
    Definition(
        "SLO attainment",
        "requests that succeeded and met every SLO / requests scheduled",
        "Errors, refusals and time-outs count as misses. A request that the client abandoned (it left, or the load was "
        "interrupted) counts only if a limit had passed by then: as a miss. 95 % interval by Wilson.",
        "inference-perf divides by successes only",
    ),
    Definition("goodput", "requests that succeeded and met every SLO / second", ""),
    Definition(
        "valid",
        "answers that have the form that was asked for / answers",
        "Of the workloads 'tools' and 'structured': the call is of one of the tools, with arguments by its schema; the "
        "answer is JSON by the schema. An invalid answer misses the SLO and is not in goodput.",
    ),
    Definition(
        "throughput",
        "tokens that arrived within the measured window / its length",
        "The window begins after the warm-up and ends with the last arrival: the time in which the rest is answered is "
        "no load.",
        "vLLM divides by the whole run, its tail included",
    ),
)


def explained() -> str:
    """All of them as text."""
    parts = [PREAMBLE, ""]
    for definition in DEFINITIONS:
        parts.append(f"{definition.name} = {definition.formula}")
        elsewhere = f"Elsewhere: {definition.elsewhere}." if definition.elsewhere else ""
        parts += [f"    {text}" for text in (definition.note, elsewhere) if text]
    return "\n".join([*parts, "", PERCENTILES])
