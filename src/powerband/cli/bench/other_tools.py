"""The command lines of `vllm bench serve` and `guidellm benchmark`, where an option has one meaning here, too.

Options that differ by name alone are other names of ours (spec/workload/options.py, options.py). What takes more than a
name is here: the option is put in place of those of ours that it means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import Group, Parameter

from powerband.cli.bench.options import RequestOptions, SLOFlags
from powerband.cli.load_options import ArrivalOptions
from powerband.errors import UsageError
from powerband.spec.quantities import number

_GROUP = Group("Spellings of vLLM and GuideLLM", sort_key=6)
_VLLM_REQUESTS, _VLLM_PROMPT, _VLLM_OUTPUT = 1000, "1024", "128"  # what it sends when it is not told

Options = TypeVar("Options", ArrivalOptions, RequestOptions, SLOFlags)


def _flag(help: str, *names: str, **more: Any) -> Parameter:
    return Parameter(name=names or None, help=help, group=_GROUP, negative="", show_default=False, **more)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class OtherToolsFlags:
    dataset_name: Annotated[
        Literal["random", "sharegpt"] | None,
        _flag("vLLM: random prompts without a shared prefix, or --dataset-path; all at once unless --request-rate"),
    ] = None
    dataset_path: Annotated[Path | None, _flag("vLLM: as --trace")] = None
    random_range_ratio: Annotated[float | None, _flag("vLLM: lengths up to this part shorter or longer")] = None
    base_url: Annotated[str | None, _flag("Both: URL of the server", "--base-url", "--target")] = None
    host: Annotated[str | None, _flag("vLLM: host of the server")] = None
    port: Annotated[int | None, _flag("vLLM: port of the server; 8000")] = None
    ignore_eos: Annotated[bool, _flag("vLLM: the default here; see --respect-eos")] = False
    save_result: Annotated[bool, _flag("vLLM: the default here; see --out")] = False
    goodput: Annotated[list[str] | None, _flag("vLLM: as --slo, in ms: ttft:500 tpot:50", consume_multiple=True)] = None
    data: Annotated[str | None, _flag("GuideLLM: prompt_tokens=256,output_tokens=128")] = None
    profile: Annotated[
        Literal["synchronous", "concurrent", "throughput", "constant", "poisson", "sweep"] | None,
        _flag("GuideLLM: how requests arrive, with --rate", "--profile", "--rate-type"),
    ] = None


def url_of(url: str | None, other: OtherToolsFlags) -> str | None:
    """The server that is named. 'serve' and 'benchmark' are the other tools' subcommands. Raises UsageError for two."""
    url = None if url in ("serve", "benchmark") else url
    address = None
    if other.host is not None or other.port is not None:
        address = f"http://{other.host or '127.0.0.1'}:{other.port or 8000}"
    given = [one for one in (url, other.base_url, address) if one is not None]
    if len(given) > 1:
        raise UsageError("The server is named twice.", param="url")
    return given[0] if given else None


def translated(
    other: OtherToolsFlags, load: ArrivalOptions, requests: RequestOptions, judging: SLOFlags
) -> tuple[ArrivalOptions, RequestOptions, SLOFlags, bool]:
    """Our options with what the other tools' mean, and whether that is a sweep.

    Raises UsageError for what contradicts another option.
    """
    if other.ignore_eos and requests.respect_eos:
        raise UsageError("--ignore-eos and --respect-eos contradict each other.", param="ignore_eos")
    if other.goodput is not None:
        judging = _given(judging, "--goodput", slo=",".join(other.goodput))
    if other.data is not None:
        requests = _given(_plain(requests), "--data", **_synthetic(other.data))
    load, requests = _dataset(other, load, requests)
    if other.profile is not None:
        load = _profile(other.profile, load)
    return load, requests, judging, other.profile == "sweep"


def _dataset(
    other: OtherToolsFlags, load: ArrivalOptions, requests: RequestOptions
) -> tuple[ArrivalOptions, RequestOptions]:
    if other.dataset_path is not None:
        load = _given(load, "--dataset-path", trace=other.dataset_path)
    if other.random_range_ratio is not None and other.dataset_name != "random":
        raise UsageError("--random-range-ratio needs --dataset-name random.", param="random_range_ratio")
    if other.dataset_name is None:
        return load, requests
    if (other.dataset_name == "sharegpt") != (load.trace is not None):
        needs = "needs" if other.dataset_name == "sharegpt" else "has no"
        raise UsageError(f"--dataset-name {other.dataset_name} {needs} --dataset-path.", param="dataset_path")
    if load.rate is None and load.concurrency is None and load.ramp is None and load.steps is None:
        load = replace(load, rate=math.inf)
    if load.requests is None and load.duration is None:
        load = replace(load, requests=_VLLM_REQUESTS)
    if other.dataset_name == "sharegpt":
        return load, requests
    ratio = other.random_range_ratio or 0.0
    lengths = (requests.prompt_tokens or _VLLM_PROMPT, requests.output_tokens or _VLLM_OUTPUT)
    prompt, output = (_range(text, ratio) for text in lengths)
    return load, replace(_plain(requests), prompt_tokens=prompt, output_tokens=output)


def _plain(requests: RequestOptions) -> RequestOptions:
    """Prompts of one piece, unless a prefix is asked for."""
    if requests.workload is not None:
        raise UsageError("--workload and another tool's data contradict each other.", param="workload")
    return replace(requests, workload="offline", prefix_tokens=requests.prefix_tokens or "0")


def _range(text: str, ratio: float) -> str:
    """'1000' with 0.2: '800-1200'."""
    if not ratio:
        return text
    if not 0 < ratio < 1 or not text.isdigit():
        raise UsageError(
            f"random_range_ratio is {ratio:g}, of a length of {text}.",
            hint="It lies between 0 and 1, and the length is one number.",
            param="random_range_ratio",
        )
    return f"{max(math.floor(int(text) * (1 - ratio)), 1)}-{math.ceil(int(text) * (1 + ratio))}"


def _synthetic(text: str) -> Mapping[str, str]:
    """'prompt_tokens=256,output_tokens=128'. Raises UsageError."""
    pairs = [part.partition("=") for part in text.split(",")]
    values = {name.strip(): value.strip() for name, _, value in pairs}
    if set(values) != {"prompt_tokens", "output_tokens"} or len(pairs) != 2 or not all(values.values()):
        raise UsageError(
            f"data is '{text}'.",
            hint="Write prompt_tokens=256,output_tokens=128; a file of requests is a --trace.",
            param="data",
        )
    return values


def _profile(profile: str, load: ArrivalOptions) -> ArrivalOptions:
    if profile in ("synchronous", "throughput", "sweep"):
        if load.rate is not None:
            raise UsageError(f"--profile {profile} has no --rate.", param="rate")
        if profile == "synchronous":
            return _given(load, "--profile", concurrency=1)
        return replace(load, rate=math.inf) if profile == "throughput" else load
    if load.rate is None:
        raise UsageError(f"--profile {profile} needs a --rate.", param="rate")
    if profile == "concurrent":
        users = int(number(f"{load.rate:g}", param="rate"))
        return _given(replace(load, rate=None), "--profile", concurrency=users)
    return _given(load, "--profile", burstiness=math.inf if profile == "constant" else 1.0)


def _given(options: Options, flag: str, **values: Any) -> Options:
    for name in values:
        if getattr(options, name) is not None:
            raise UsageError(f"{flag} and --{name.replace('_', '-')} contradict each other.", param=name)
    return replace(options, **values)
