"""Write docs/settings.md and docs/metrics.md from the code: `python scripts/document.py`. A test keeps them current."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from powerband.cli.flags import KNOWN_SETTINGS
from powerband.cli.settings import PREFIX
from powerband.gateway.observability.metrics import GatewayMetrics
from powerband.metrics.prometheus import ALIASES, EngineMetrics
from powerband.renamed import new_names, option
from powerband.spec.settings import KIND_NAMES, choices, value_types

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
    return {DOCS / "settings.md": settings_page(), DOCS / "metrics.md": metrics_page()}


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
    shown = "–" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"
    flag = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
    return f"| `{flag}`<br>`{PREFIX}{name.upper()}` | {_values(declared, metadata)} | {shown} | {metadata['help']} |\n"


def _values(declared: Any, metadata: Any) -> str:
    if choices(declared):
        return ", ".join(f"`{choice}`" for choice in choices(declared))
    kind = next((k for k in get_args(declared) if k is not NoneType), declared)
    low, high = metadata["minimum"], metadata["maximum"]
    limits = f", {low} to {high}" if high is not None else f", at least {low}" if low is not None else ""
    return KIND_NAMES[kind] + limits


if __name__ == "__main__":
    for path, content in pages().items():
        path.write_text(content, encoding="utf-8")
