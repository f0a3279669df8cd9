"""Draw the frontier of a plan as SVG for the documentation: cost an hour against TTFT, light or dark as its reader is.

docs/images/frontier.svg is Llama-3-8B on several L4 or A10G, or on one A100:

    powerband plan meta-llama/Meta-Llama-3-8B --devices L4,A10G,A100-80G --workload chat --rate 4 \\
        --slo ttft=1s@p95,tpot=60ms@p95 --json | python scripts/frontier_picture.py docs/images/frontier.svg
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 470, 64, 20, 62, 46
# The colours and shapes of the report's page (planner/report/page).
LIGHT = ("#0b63c4", "#b5408f", "#00796b", "#9a5b00", "#6b4fd8", "#2b7f9e", "#a8322a", "#5f6b00")
DARK = ("#62abff", "#f08cc8", "#3cc9b2", "#e0a94a", "#b6a1ff", "#7fcfe8", "#ff9080", "#c3d05a")
SHAPES = (
    "M-5,0A5,5,0,1,1,5,0A5,5,0,1,1,-5,0Z",
    "M0,-6L5.6,5L-5.6,5Z",
    "M-4.6,-4.6H4.6V4.6H-4.6Z",
    "M0,-6L6,0L0,6L-6,0Z",
)
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink); }
.muted { fill: var(--muted); font-size: 11px; } .name { font-weight: 600; }
.halo { stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; paint-order: stroke; }
.grid { stroke: var(--line); stroke-width: .7; } .band { stroke: var(--muted); stroke-width: 1.2; }
.best { fill: none; stroke: var(--ink); stroke-opacity: .5; stroke-width: 1.5; }
.limit { stroke: var(--limit); stroke-width: 1.4; stroke-dasharray: 6 4; }
.limit-text { fill: var(--limit); font-size: 11px; } .ring { fill: none; stroke: var(--ink); stroke-width: 2; }
.quiet { opacity: .5; }
"""
THEMES = {
    "light": "--card:#fff; --ink:#1b1f24; --muted:#59636e; --line:#d9dee4; --limit:#bc4c00; --quiet:#a3adb8",
    "dark": "--card:#0d1117; --ink:#e8ecf1; --muted:#9ba6b2; --line:#2c343e; --limit:#ff9a52; --quiet:#5a6572",
}


@dataclass(frozen=True)
class Axis:
    """Logarithmic: values from `least` to `most` onto pixels from `start` to `end`."""

    least: float
    most: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = math.log(value / self.least) / math.log(self.most / self.least)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        powers = range(math.floor(math.log10(self.least)), math.ceil(math.log10(self.most)) + 1)
        values = [float(f"{step}e{power}") for power in powers for step in (1, 2, 5)]
        return [value for value in values if self.least <= value <= self.most]


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    Path(sys.argv[1]).write_text(picture(json.load(sys.stdin)), encoding="utf-8")
    return 0


def picture(found: dict[str, Any]) -> str:
    limit = found["slo"].get("ttft_s")
    points = [
        (one["usd_per_hour"], one["figures"]["ttft_s"]["value"], number, one)
        for number, one in enumerate(found["evaluations"])
        if one["usd_per_hour"] and one["figures"]["ttft_s"]["value"]
    ]
    good = [point for point in points if point[3]["meets_slo"]] or points
    highest = max([3 * limit] if limit else [], default=max(ttft for _, ttft, _, _ in good))
    points = [point for point in points if point[1] <= highest]
    x = Axis(min(p[0] for p in points) / 1.3, max(p[0] for p in points) * 1.3, LEFT, WIDTH - RIGHT)
    y = Axis(min(p[1] for p in points) / 1.4, highest * 1.1, HEIGHT - BOTTOM, TOP)
    kinds = sorted({kind(one) for _, _, _, one in points})
    shapes = [(x.at(cost), y.at(ttft), number, one) for cost, ttft, number, one in points]
    parts = [
        *grid(x, y, found["slo"].get("attainment", 0.95)),
        *limits(x, y, limit, found["budget_usd_per_hour"]),
        *line(best(good), x, y),
        *drawn(shapes, kinds, found["recommended"]),
        *labels(shapes, found, {number for _, _, number, _ in best(good)}),
        *legend(kinds),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Deployments by cost an hour and time to first token">\n<style>{css()}</style>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="var(--card)"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def css() -> str:
    def colours(values: Iterable[str]) -> str:
        return "; ".join(f"--kind{number}:{value}" for number, value in enumerate(values))

    light = f"svg {{ {THEMES['light']}; {colours(LIGHT)} }}"
    dark = f"@media (prefers-color-scheme: dark) {{ svg {{ {THEMES['dark']}; {colours(DARK)} }} }}"
    return f"\n{light}\n{dark}{STYLE}"


def kind(one: dict[str, Any]) -> str:
    return " + ".join(dict.fromkeys(pool["replica"]["device"] for pool in one["pools"]))


def best(points: list[Any]) -> list[Any]:
    """No other of these is cheaper and as fast."""
    kept: list[Any] = []
    for point in sorted(points, key=lambda point: point[:2]):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def grid(x: Axis, y: Axis, attainment: float) -> Iterator[str]:
    for value in x.ticks():
        yield f'<path class="grid" d="M{x.at(value)},{TOP}V{HEIGHT - BOTTOM}"/>'
        yield text(x.at(value), HEIGHT - BOTTOM + 17, f"${value:g}", "muted", "middle")
    for value in y.ticks():
        yield f'<path class="grid" d="M{LEFT},{y.at(value)}H{WIDTH - RIGHT}"/>'
        yield text(LEFT - 8, y.at(value) + 4, seconds(value), "muted", "end")
    yield text((LEFT + WIDTH) / 2, HEIGHT - 8, "cost an hour", "muted", "middle")
    yield text(14, TOP - 12, f"time to first token, p{attainment * 100:g}", "muted")


def limits(x: Axis, y: Axis, ttft_s: float | None, budget: float | None) -> Iterator[str]:
    if ttft_s is not None:
        yield f'<path class="limit" d="M{LEFT},{y.at(ttft_s)}H{WIDTH - RIGHT}"/>'
        yield text(WIDTH - RIGHT - 4, y.at(ttft_s) - 6, f"SLO {seconds(ttft_s)}", "limit-text halo", "end")
    if budget is not None and x.least < budget < x.most:
        yield f'<path class="limit" d="M{x.at(budget)},{TOP}V{HEIGHT - BOTTOM}"/>'
        yield text(x.at(budget) + 6, TOP + 12, f"budget ${budget:g}", "limit-text halo")


def line(points: list[Any], x: Axis, y: Axis) -> Iterator[str]:
    """A staircase, and the bands of its corners."""
    path = f"M{x.at(points[0][0])},{y.at(points[0][1])}"
    path += "".join(f"H{x.at(cost)}V{y.at(ttft)}" for cost, ttft, _, _ in points[1:])
    yield f'<path class="best" d="{path}"/>'
    for cost, _, _, one in points:
        band = one["figures"]["ttft_s"]
        low, high = max(band["low"], y.least), min(band["high"] or y.most, y.most)
        yield f'<path class="band" d="M{x.at(cost)},{y.at(low)}V{y.at(high)}"/>'


def drawn(shapes: list[Any], kinds: list[str], recommended: int | None) -> Iterator[str]:
    """What is worth looking at on top; of grey ones at one place one."""
    taken = set()
    quiet = {number for _, _, number, one in shapes if one["dominated"] and number != recommended}
    for across, up, number, one in sorted(shapes, key=lambda shape: shape[2] not in quiet):
        place = (round(across / 2), round(up / 2), number in quiet, one["meets_slo"])
        if place not in taken:
            taken.add(place)
            yield shape(across, up, one, kinds.index(kind(one)), number in quiet)


def shape(across: float, up: float, one: dict[str, Any], index: int, is_quiet: bool) -> str:
    colour = "var(--quiet)" if is_quiet else f"var(--kind{index % len(LIGHT)})"
    fill = colour if one["meets_slo"] else "var(--card)"
    look = f'fill="{fill}" stroke="{colour}" stroke-width="{0 if one["meets_slo"] else 1.5}"'
    name = (
        f"{escape(one['name'])}: ${one['usd_per_hour']:.2f} an hour, TTFT {seconds(one['figures']['ttft_s']['value'])}"
    )
    where = f"translate({across},{up})" + (" scale(.6)" if is_quiet else "")
    quiet = ' class="quiet"' if is_quiet else ""
    return f'<path{quiet} d="{SHAPES[index % len(SHAPES)]}" transform="{where}" {look}><title>{name}</title></path>'


def labels(shapes: list[Any], found: dict[str, Any], corners: set[int]) -> Iterator[str]:
    """The recommended one and its neighbours by their part, the corners of the line by their names."""
    roles = {number: name for name, number in found["alternatives"].items()} | {found["recommended"]: "recommended"}
    taken: list[tuple[float, float, str]] = []
    for across, up, number, one in sorted(shapes, key=lambda s: (s[2] != found["recommended"], s[2] not in roles)):
        if number not in roles and number not in corners:
            continue
        role = roles.get(number)
        if role == "recommended":
            yield f'<circle class="ring" cx="{across}" cy="{up}" r="10"/>'
        side, anchor = (-14, "end") if across > WIDTH * 0.7 or role == "cheaper" else (14, "start")
        if any(abs(across - x) < 150 and abs(up - y) < 32 and anchor == other for x, y, other in taken):
            continue
        taken.append((across, up, anchor))
        if role:
            yield text(across + side, up - 4, role, "name halo", anchor)
        yield text(across + side, up + (11 if role else -7), one["name"], "muted halo", anchor)


def legend(kinds: list[str]) -> Iterator[str]:
    across = 14.0
    for number, name in enumerate(kinds):
        colour = f"var(--kind{number % len(LIGHT)})"
        yield f'<path d="{SHAPES[number % len(SHAPES)]}" transform="translate({across + 6},20)" fill="{colour}"/>'
        yield text(across + 17, 24, name)
        across += 36 + 7.2 * len(name)
    note = "hollow: misses the SLO · grey: another costs no more and is no slower"
    yield text(WIDTH - RIGHT, 24, note, "muted", "end")


def text(x: float, y: float, words: str, kinds: str = "", anchor: str = "start") -> str:
    named = f' class="{kinds}"' if kinds else ""
    at = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:g}" y="{y:g}"{named}{at}>{escape(words)}</text>'


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


if __name__ == "__main__":
    sys.exit(main())
