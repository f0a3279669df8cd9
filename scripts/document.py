"""Write docs/settings.md, docs/metrics.md and docs/plan-file.md from the code: `python scripts/document.py`.

A test keeps them current.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from powerband.cli.flags import KNOWN_SETTINGS
from powerband.gateway.observability.metrics import GatewayMetrics
from powerband.metrics.prometheus import ALIASES, EngineMetrics
from powerband.renamed import new_names, option
from powerband.spec.deployment import Deployment, Replica, ReplicaPool
from powerband.spec.plan import Plan, PlanCost, Promise
from powerband.spec.settings import KIND_NAMES, choices, value_types
from powerband.spec.settings_layers import PREFIX
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import ClosedLoop, OpenLoop, Replay
from powerband.spec.workload.lengths import KINDS as LENGTHS
from powerband.spec.workload.workload import RequestMix, Workload

DOCS = Path(__file__).resolve().parents[1] / "docs"
SETTINGS = """\
# Settings

<!-- Written by scripts/document.py from the settings classes. Change those, then run the script. -->

Every setting below can be given in four ways. The first that is present counts:

1. a flag: `powerband serve demo --max-num-seqs 8`
2. an environment variable: `POWERBAND_MAX_NUM_SEQS=8 powerband serve demo`
3. a line in a YAML file, `max_num_seqs: 8`, named by `--config powerband.yaml`
4. the default

`powerband config show` takes the flags of `powerband serve` and prints each value with its origin. A setting that is
unknown, out of range, or has no effect because of the others is an error, never ignored. A setting that is on or off
has two flags: `--enable-prefix-caching` and `--no-enable-prefix-caching`. The groups from Model to Scheduling are also
keyword arguments of `powerband.LLM`. Server has the settings of `powerband serve`; Gateway, Queue and Failure have
those of `powerband gateway`. `POWERBAND_DEBUG=1` is not a setting: it prints the traceback of an unexpected error.
"""


METRICS = """\
# Metrics

<!-- Written by scripts/document.py from metrics/prometheus.py and the metrics of gateway/observability. -->

`GET /metrics` answers in Prometheus' text format, at a replica and at a gateway. Latencies are defined in
[Design](design.md#figures). Their buckets are eight per decade from 0.1 ms to 75 s, and wider above.

## A replica's

Each figure appears under Powerband's name and under the name that
vLLM's dashboards, gateways and autoscalers read; the two are the same number. Labels are the served model's name, the
engine, and reasons from a fixed list: nothing in a request can add a time series.

| metric | also known as | kind | what it is |
|---|---|---|---|
"""

GATEWAY_METRICS = """
## A gateway's

Latencies here are what clients saw, with the wait at the gateway in them. Names that begin with `gen_ai_` are
OpenTelemetry's for generative AI (conventions in development), as Prometheus writes them, with their buckets and
attributes. Labels are served names, ids of present replicas and words from fixed lists.

| metric | kind | labels | what it is |
|---|---|---|---|
"""


BOARDS = """
## Board and alerts

The package holds, in `powerband/gateway/boards/`, what Prometheus and Grafana need:

| file | what it is |
|---|---|
| `prometheus.yml` | scrapes a gateway, and through it every replica as they come and go |
| `alerts.yml` | recording rules for the burn of the budget of misses, and alerts |
| `grafana.json` | a board: promise, latency, traffic, replicas, keys and usage; import it and choose the data source |

`GET /metrics/targets` tells Prometheus of all replicas (`http_sd_configs`), and `/metrics/replicas/ID` what one
of them shows: a gateway has the replicas' keys, Prometheus need not. Where the gateway wants keys, these paths need one
with the scope `metrics`.

```
cp -r $(python -c "import pathlib, powerband; print(pathlib.Path(powerband.__file__).parent / 'gateway/boards')") boards
cd boards && prometheus --config.file=prometheus.yml --storage.tsdb.path=data
```
"""


def pages() -> dict[Path, str]:
    """The content of every page that this script writes."""
    made = {"settings": settings_page(), "metrics": metrics_page(), "plan-file": plan_page()}
    return {DOCS / f"{name}.md": content for name, content in made.items()}


def metrics_page() -> str:
    rows = []
    for family in EngineMetrics("demo").collect():
        ours = family.name.removeprefix("powerband_")
        if ours == family.name:  # an alias, shown beside our name
            continue
        suffix = "_total" if family.type == "counter" else ""
        alias = f"`vllm:{ALIASES[ours]}{suffix}`" if ours in ALIASES else "–"
        rows.append(f"| `powerband_{ours}{suffix}` | {alias} | {family.type} | {family.documentation} |\n")
    return METRICS + "".join(rows) + GATEWAY_METRICS + "".join(_gateway_rows()) + BOARDS


def _gateway_rows() -> Iterator[str]:
    for family in GatewayMetrics().collect():
        suffix = "_total" if family.type == "counter" else ""
        labels: tuple[str, ...] = family._labelnames  # type: ignore[attr-defined] # of every family but a plain Metric
        shown = ", ".join(f"`{label}`" for label in labels) or "–"
        yield f"| `{family.name}{suffix}` | {family.type} | {shown} | {family.documentation} |\n"


def settings_page() -> str:
    groups: dict[str, list[str]] = {}
    for settings in KNOWN_SETTINGS:
        for item in fields(settings):
            row = _row(item.name, value_types(settings)[item.name], item.default, item.metadata)
            groups.setdefault(item.metadata["group"], []).append(row)
    tables = (f"## {group}\n\n{HEAD}" + "".join(rows) for group, rows in groups.items())
    names = {old: new for settings in KNOWN_SETTINGS for old, new in new_names(settings).items()}
    renamed = RENAMED + "".join(f"| `{option(old)}` | `{option(new)}` |\n" for old, new in names.items())
    return SETTINGS + "\n" + "\n".join([*tables, *([renamed] if names else [])])


RENAMED = """\
## Renamed settings

In this release the old names still work, in all four ways, with a warning.

| old name | new name |
|---|---|
"""
HEAD = "| setting | value | default | what it does |\n|---|---|---|---|\n"


def _row(name: str, declared: Any, default: Any, metadata: Any) -> str:
    shown = "–" if default in (None, ()) else f"`{str(default).lower() if isinstance(default, bool) else default}`"
    flag = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
    return f"| `{flag}`<br>`{PREFIX}{name.upper()}` | {_values(declared, metadata)} | {shown} | {metadata['help']} |\n"


def _values(declared: Any, metadata: Any) -> str:
    if choices(declared):
        return ", ".join(f"`{choice}`" for choice in choices(declared))
    kind = next((k for k in get_args(declared) if k is not NoneType), declared)
    low, high = metadata["minimum"], metadata["maximum"]
    limits = f", {low} to {high}" if high is not None else f", at least {low}" if low is not None else ""
    kind = tuple[str, ...] if declared == tuple[str, ...] else kind
    return KIND_NAMES[kind] + limits


PLAN = """\
# Plan file

<!-- Written by scripts/document.py from the classes of spec/. Change those, then run the script. -->

`powerband plan -o plan.yaml` writes a plan, `powerband deploy plan.yaml` carries it out, `powerband simulate plan.yaml`
plays other loads through it, and `powerband bench URL --plan plan.yaml` checks its promise. It is plain YAML. What is
unknown, missing or out of range is an error that names it.

## By hand

A plan may be written by hand, for instance for a machine that was not calibrated (`device: cpu`). This one is complete:

<!-- tests write: plan.yaml -->
```yaml
{example}```

```
powerband deploy plan.yaml
```

A field with a default may be left out. Without `deployment` a plan is a promise, which `powerband bench URL --plan
plan.yaml` checks at any server.
"""
PLAN_EXAMPLE = """\
version: 1
model: demo
deployment:
  engine: powerband
  pools:
    - replica: {device: cpu, max_model_len: 1024, max_num_seqs: 16}
      count: 2
workload:
  name: short chats
  arrivals: {kind: open, phases: [{start: 2.0, end: 2.0}]}
  requests:
    prompt: {kind: uniform, low: 32, high: 160}
    output: {kind: uniform, low: 16, high: 64}
slo: {ttft_s: 0.5, tpot_s: 0.05, attainment: 0.95}
promise: {rate: 2.0}
"""
# Title, where its tables stand, its class, and what its fields mean. A field without a word here stops the script.
PLAN_TABLES: tuple[tuple[str, str, type, dict[str, str]], ...] = (
    (
        "The file",
        "",
        Plan,
        {
            "model": "Hugging Face id, folder, or `demo`",
            "workload": "what it was made for: [workload](#workload)",
            "slo": "what its users may expect: [slo](#slo)",
            "promise": "the load at which they may: [promise](#promise)",
            "deployment": "what to run: [deployment](#deployment)",
            "predicted": "figure → `value`, `low`, `high` (for nine measurements in ten). Nothing depends on it",
            "cost": "[cost](#cost). Nothing depends on it",
        },
    ),
    (
        "deployment",
        "",
        Deployment,
        {
            "engine": "what serves",
            "pools": "[pools](#pool), ordered by `max_prompt_tokens`; the last one has none and takes any prompt",
        },
    ),
    (
        "pool",
        "An entry of `deployment: pools`.",
        ReplicaPool,
        {
            "replica": "how each [replica](#replica) is made",
            "count": "number of replicas",
            "max_prompt_tokens": "maximum prompt of the requests that it gets; null: no limit",
        },
    ),
    (
        "replica",
        "",
        Replica,
        {
            "device": "`local`: this machine as calibrated; `cpu`: not calibrated; a name in the catalog, or a file",
            "tensor_parallel": "devices over which each layer is divided",
            "pipeline_parallel": "stages over which the layers are divided",
            "expert_parallel": "devices over which whole experts are divided: 1 or `tensor_parallel`",
            "quantization": "precision of the weights",
            "kv_precision": "precision of the KV cache",
            "offload_share": "fraction of the weights that stay in the host's memory",
            "max_model_len": "maximum prompt plus output, in tokens",
            "max_num_seqs": "maximum requests that run at once",
            "max_num_batched_tokens": "token budget of a step",
            "long_prefill_token_threshold": "maximum prefill chunk of one request in a step; 0: the token budget",
            "gpu_memory_utilization": "fraction of a GPU's memory that the engine may use",
            "enable_prefix_caching": "reuse the KV cache of common prefixes",
            "draft_tokens": "speculative decoding: tokens drafted in each step",
            "draft_acceptance": "fraction of them that is expected to be accepted",
        },
    ),
    (
        "slo",
        "A request meets the SLO when it meets all limits.",
        SLO,
        {
            "ttft_s": "maximum seconds to the first token",
            "tpot_s": "maximum mean seconds per output token after the first",
            "stall_s": "maximum pause between two tokens",
            "e2e_s": "maximum seconds for the whole answer",
            "attainment": "fraction of requests that must meet it",
        },
    ),
    (
        "promise",
        "",
        Promise,
        {
            "rate": "requests per second",
            "output_tokens_per_s": "at least so many output tokens per second at that rate; null: not promised",
        },
    ),
    (
        "cost",
        "",
        PlanCost,
        {
            "usd_per_hour": "of all machines",
            "usd_per_million_tokens": "of output, at the promised rate",
            "machines": "machine → how many",
        },
    ),
    (
        "workload",
        "",
        Workload,
        {
            "name": "for reports",
            "arrivals": "when requests arrive: [arrivals](#arrivals)",
            "requests": "what they are: [requests](#requests); or `trace`: file, format and SHA-256 of a trace",
            "max_model_len": "longer requests are cut to this context (prompt plus output, in tokens)",
        },
    ),
    (
        "arrivals",
        "With `kind: open`: requests arrive whether or not others were answered.",
        OpenLoop,
        {
            "phases": "a list of `start`, `end` (requests per second) and `seconds`; without `seconds`: without end",
            "burstiness": "1: Poisson; below 1: burstier",
        },
    ),
    (
        "arrivals, closed",
        "With `kind: closed`: users who each wait for their answer.",
        ClosedLoop,
        {
            "concurrency": "number of users",
            "think_s": "mean seconds from an answer to the next request",
        },
    ),
    (
        "arrivals, replayed",
        "With `kind: replay`: at the times of a trace.",
        Replay,
        {"speedup": "so many times as fast"},
    ),
    (
        "requests",
        "Lengths are in tokens: [lengths](#lengths).",
        RequestMix,
        {
            "prompt": "length of a prompt, or of a turn, beyond the prefix",
            "output": "length of an answer",
            "prefix": "what prompts have in common: `tokens` (lengths), `groups` (number of different ones), `share`"
            " (of requests that have one), `skew` (0: all alike; else Zipf's exponent)",
            "form": "of the answers: `text`, `tools` (calls) or `structured` (JSON by a schema)",
            "conversation": "`turns` (lengths) and `think_s`: requests that wait for each other's answers",
        },
    ),
)


PLAN_HEAD = "| field | value | default | meaning |\n|---|---|---|---|\n"


def plan_page() -> str:
    Plan.from_dict(yaml.safe_load(PLAN_EXAMPLE))  # an example that cannot be read stops the script
    parts = [PLAN.replace("{example}", PLAN_EXAMPLE)]
    for title, about, kind, words in PLAN_TABLES:
        rows = ["| `version` | `1` | required | version of the format |\n"] if kind is Plan else []
        hints, items = get_type_hints(kind), {item.name: item for item in fields(kind)}
        if unknown := words.keys() - items.keys():
            raise SystemExit(f"{kind.__name__} has no {', '.join(unknown)}")
        for name, item in items.items():
            rows.append(f"| `{name}` | {_plan_type(hints[name])} | {_plan_default(item)} | {words[name]} |\n")
        parts.append(f"\n## {title}\n\n" + (f"{about}\n\n" if about else "") + PLAN_HEAD + "".join(rows))
    kinds = [f"| `{name}` | {_lengths_fields(kind)} |\n" for name, kind in LENGTHS.items()]
    parts.append("\n## lengths\n\nA table with a `kind`, and with:\n\n| kind | fields |\n|---|---|\n" + "".join(kinds))
    return "".join(parts)


def _lengths_fields(kind: type) -> str:
    shown = (f"`{f.name}`" + ("" if f.default is MISSING else f" ({f.default})") for f in fields(kind) if f.init)
    return ", ".join(shown)


def _plan_type(declared: Any) -> str:
    if choices(declared):
        return ", ".join(f"`{choice}`" for choice in choices(declared))
    is_optional = NoneType in get_args(declared)
    kind = next(k for k in get_args(declared) if k is not NoneType) if is_optional else declared
    return KIND_NAMES.get(kind, "a list" if get_origin(kind) is tuple else "a table")


def _plan_default(item: Field[Any]) -> str:
    if item.default is MISSING:
        return "required" if item.default_factory is MISSING else "–"
    return "–" if item.default is None else f"`{yaml.safe_dump(item.default).splitlines()[0]}`"


if __name__ == "__main__":
    for path, content in pages().items():
        path.write_text(content, encoding="utf-8")
