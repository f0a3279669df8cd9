"""What `make drills` runs: every drill at full length, and then the table of what was measured.

    python scripts/drills.py [--soak 30m] [--kills 300] [--seed 7] [--out drills.json] [for pytest, such as -k overload]

300 kills one at a time, and half as many pairs, take some 10,000 requests and an hour.

The same files run in a shorter form with the tests. Exits with 1 when a drill failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "drills"
FULL = {"DRILLS_OVERLOAD_S": "60", "DRILLS_HELD_S": "100"}
_WIDTH = 110


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soak", default="2m", help="how long, such as 30m")
    parser.add_argument("--kills", type=int, default=16, help="at random, one at a time; then half as many pairs")
    parser.add_argument("--seed", type=int, default=13, help="chooses who is killed, and how")
    parser.add_argument("--out", type=Path, help="a file for the figures (JSON)")
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "drills.jsonl"
        chosen = {"DRILLS_SOAK": options.soak, "DRILLS_KILLS": str(options.kills), "DRILLS_SEED": str(options.seed)}
        env = {**os.environ, **FULL, **chosen, "DRILLS_FILE": str(told)}
        command = [sys.executable, "-m", "pytest", "--timeout=0", "-p", "no:cacheprovider", str(FOLDER), *more]
        code = subprocess.run(command, env=env, check=False).returncode
        drills = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    if options.out is not None:
        options.out.write_text(json.dumps(drills, indent=2) + "\n")
    show(drills)
    return 1 if code else 0


def show(drills: list[dict[str, Any]]) -> None:
    width = max((len(one["drill"]) for one in drills), default=0)
    print()
    for one in drills:
        figures = [f"{name.replace('_', ' ')} {value}" for name, value in one["figures"].items()]
        lines = _wrapped(figures, _WIDTH - width)
        head = f"{'ok    ' if one['passed'] else 'FAILED'} {one['drill']:<{width}}  "
        for line in lines or ["-"]:
            print(f"{head}{line}")
            head = " " * len(head)


def _wrapped(figures: list[str], width: int) -> list[str]:
    """Whole figures to a line."""
    lines: list[str] = []
    for figure in figures:
        if lines and len(lines[-1]) + len(figure) + 3 <= width:
            lines[-1] += f" · {figure}"
        else:
            lines.append(figure)
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
