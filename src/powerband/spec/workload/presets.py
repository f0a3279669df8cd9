"""Workloads by name. Each docstring says where its figures come from; every one of them can be replaced.

The arrivals of a preset are only its burstiness: the rate is the user's to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from powerband.errors import UsageError
from powerband.spec.workload.lengths import Empirical, Fixed, LogNormal, Uniform
from powerband.spec.workload.workload import Conversation, RequestMix, SharedPrefix


@dataclass(frozen=True, slots=True)
class Preset:
    """burstiness: of an open loop, see arrivals.OpenLoop."""

    mix: RequestMix
    burstiness: float = 1.0


# Means of the twentieths of the sorted lengths, from the Azure LLM inference traces 2023 (Patel et al., Splitwise, ISCA
# 2024): the traces have several peaks, which no lognormal has. What a prompt shared is not in them.
_CHAT_PROMPTS = "111 197 259 379 392 400 408 454 909 1004 1033 1058 1084 1113 1155 1268 1497 2305 3792 4281"
_CHAT_OUTPUTS = "27 48 61 72 81 88 93 99 108 120 139 163 197 332 391 397 406 417 434 551"
_CHAT_SHARED = 96
_CODE_PROMPTS = "41 107 186 303 482 675 860 1009 1156 1362 1576 1797 2045 2305 2580 2944 3518 4454 6138 7430"
_CODE_OUTPUTS = "6 6 7 8 9 9 10 11 12 13 14 15 17 19 22 26 33 47 70 207"


def _observed(twentieths: str, less: int = 0) -> Empirical:
    return Empirical(tuple(int(tokens) - less for tokens in twentieths.split()))


def chat() -> Preset:
    """Single questions to an assistant, with one system prompt for all.

    Lengths as of 19,366 requests of the Azure trace, conversation: prompts of mean 1,155 and median 1,020, outputs of
    mean 211 and median 129 tokens, drawn independently of each other; gaps between arrivals with its coefficient of
    variation, 1.09. That 96 tokens of each prompt are shared is assumed.
    """
    prompts = _observed(_CHAT_PROMPTS, less=_CHAT_SHARED)
    return Preset(RequestMix(prompts, _observed(_CHAT_OUTPUTS), SharedPrefix(Fixed(_CHAT_SHARED))), burstiness=0.84)


def conversation() -> Preset:
    """Talks of several turns that wait for the answer, each turn with everything before it.

    A turn as in Zheng et al., LMSYS-Chat-1M, ICLR 2024, table 1: prompts of mean 69.5 and answers of mean 214.5 tokens.
    Assumed: 1 to 7 turns, mean 4 (there 2.0, single questions included), ten seconds of thinking, a system prompt of
    256 tokens, and the spreads.
    """
    talk = Conversation(Uniform(1, 7), think_s=10.0)
    prompt = LogNormal(median=34, sigma=1.2, high=4096)
    return Preset(RequestMix(prompt, LogNormal(median=157, sigma=0.8, high=2048), SharedPrefix(Fixed(256)), talk))


def rag() -> Preset:
    """Questions about retrieved passages: a long prompt, of which instructions are shared, and a short answer.

    Assumed, after the usual set-up of four to ten passages of 256 to 512 tokens (Lewis et al., 2020, retrieve five to
    ten of 100 words): 1,000 to 5,000 tokens of passages and question, 512 of instructions, answers of median 150.
    """
    return Preset(
        RequestMix(Uniform(1000, 5000), LogNormal(median=150, sigma=0.5, high=1024), SharedPrefix(Fixed(512)))
    )


def summarization() -> Preset:
    """One document to a few sentences.

    Means of LongBench as in Zhong et al., DistServe, OSDI 2024, table of workloads: prompts of 1,738 and outputs of
    91 tokens; spreads are assumed.
    """
    return Preset(RequestMix(LogNormal(median=1400, sigma=0.66, high=16384), LogNormal(median=80, sigma=0.5, high=512)))


def code() -> Preset:
    """Completion in an editor: much context, a few tokens, requests in bursts.

    Lengths as of 8,819 requests of the Azure trace, code: prompts of mean 2,048 and median 1,469, outputs of mean 28
    and median 13 tokens, drawn independently of each other. Gaps between its arrivals vary by a coefficient of 13; 4 is
    used here (burstiness 1/16), because the trace's minutes without any request are not a load.
    """
    return Preset(RequestMix(_observed(_CODE_PROMPTS), _observed(_CODE_OUTPUTS)), burstiness=1 / 16)


def agent() -> Preset:
    """A tool-using agent: long instructions shared by many, and turns that follow each other almost at once.

    Qin et al., Mooncake, FAST 2025, table of traces (tool and agent): prompts of mean 8,596 and outputs of mean 182
    tokens, 59 % of prompt tokens in the prefix cache. So it is here; how that comes about is assumed: 1 to 4 turns,
    1,400 shared tokens in 8 versions, 3,500 new tokens in each turn, a second between them.
    """
    talk = Conversation(Uniform(1, 4), think_s=1.0)
    prefix = SharedPrefix(Fixed(1400), groups=8, skew=1.0)
    prompt = LogNormal(median=2140, sigma=1.0, high=32768)
    return Preset(RequestMix(prompt, LogNormal(median=122, sigma=0.9, high=2048), prefix, talk))


def offline() -> Preset:
    """A batch that is there at once: throughput is all that counts.

    512 prompt and 256 output tokens, a common point of comparison; assumed, and the same for every request.
    """
    return Preset(RequestMix(Fixed(512), Fixed(256)))


def tools() -> Preset:
    """Questions that a model answers by calling one of two tools (`tool_choice` is required).

    Assumed: prompts of median 150 tokens beside the tools, and calls of median 35. A call ends by itself: the load
    generator leaves room for more.
    """
    outputs = LogNormal(median=35, sigma=0.3, high=128)
    return Preset(RequestMix(LogNormal(median=150, sigma=0.5, high=1024), outputs, form="tools"))


def structured() -> Preset:
    """Texts that a model turns into a JSON object by a schema (`response_format`).

    Assumed: prompts of median 300 tokens, and objects of median 60. An object ends by itself: the load generator leaves
    room for more.
    """
    outputs = LogNormal(median=60, sigma=0.4, high=256)
    return Preset(RequestMix(LogNormal(median=300, sigma=0.5, high=2048), outputs, form="structured"))


PRESETS: dict[str, Callable[[], Preset]] = {
    preset.__name__: preset
    for preset in (chat, conversation, rag, summarization, code, agent, offline, tools, structured)
}


def preset(name: str) -> Preset:
    """Raises UsageError for a name that is none."""
    if name not in PRESETS:
        raise UsageError(f"Unknown workload '{name}'.", hint=f"There are: {', '.join(PRESETS)}.", param="workload")
    return PRESETS[name]()
