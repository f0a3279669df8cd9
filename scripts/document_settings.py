"""Write docs/settings.md from the settings classes: `python scripts/document_settings.py`. A test keeps it current."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from powerband.cli.flags import ALL_SETTINGS
from powerband.cli.settings import PREFIX
from powerband.spec.settings import KIND_NAMES, choices, value_types

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
INTRODUCTION = """\
# Settings

<!-- Written by scripts/document_settings.py from the settings classes. Change those, then run the script. -->

Every setting below can be given in four ways. The first that is present counts:

1. a flag: `powerband serve demo --max-num-seqs 8`
2. an environment variable: `POWERBAND_MAX_NUM_SEQS=8 powerband serve demo`
3. a line in a YAML file, `max_num_seqs: 8`, named by `--config powerband.yaml`
4. the default

`powerband config show` takes the same flags and prints each value with its origin. A setting that is unknown, out of
range, or without effect beside the others is an error, never ignored. Settings that are on or off have two flags:
`--enable-prefix-caching` and `--no-enable-prefix-caching`. The groups from Model to Scheduling are also keyword
arguments of `powerband.LLM`. `POWERBAND_DEBUG=1` is no setting: it prints the traceback of an unexpected error.
"""


def page() -> str:
    """The whole page as Markdown."""
    groups: dict[str, list[str]] = {}
    for settings in ALL_SETTINGS:
        for item in fields(settings):
            row = _row(item.name, value_types(settings)[item.name], item.default, item.metadata)
            groups.setdefault(item.metadata["group"], []).append(row)
    tables = (f"## {group}\n\n{HEAD}" + "".join(rows) for group, rows in groups.items())
    return INTRODUCTION + "\n" + "\n".join(tables)


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
    PAGE.write_text(page(), encoding="utf-8")
