"""Whether a calibration is good enough to plan with. On a machine that others use it may be off by a factor."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import psutil

from powerband.calibration.curve_fit import FitErrors
from powerband.errors import EnvironmentFault
from powerband.spec.hardware.profile import HostModel

# Catalog devices that were not measured are known to ±25 to 35 %. What is further off than these is of no use.
MAX_MEDIAN, MAX_P90 = 0.5, 1.0
MAX_WAY_S = 0.5  # from a client to the engine, and back
_MAX_LOAD = 0.25  # of other programs: of each core

_SHOWN, _LOOK_S, _BUSY_PERCENT = 3, 0.5, 10.0  # of a core

Fit = TypeVar("Fit")
ReportProgress = Callable[[str, float], object]  # what is measured, and the share of it that is done


def is_usable(errors: FitErrors) -> bool:
    return errors.median <= MAX_MEDIAN and errors.p90 <= MAX_P90


def better_of_two(
    measure: Callable[[ReportProgress], Fit], errors: Callable[[Fit], FitErrors], report: ReportProgress
) -> Fit:
    """Measured once; where that is not usable, once more, and the better of both."""
    first = measure(report)
    if is_usable(errors(first)):
        return first
    why = f"once more, since the error was ±{errors(first).p90:.0%}"
    second = measure(lambda text, fraction: report(f"{text} ({why})", fraction))
    return min((first, second), key=lambda fit: errors(fit).p90)


def load_per_core() -> float:
    """Of the last minute, by all programs."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def busy_text(load: float) -> str:
    """What to say before measuring a machine that other programs use; '' for an idle one. load: load_per_core()."""
    if load <= _MAX_LOAD:
        return ""
    cores = os.cpu_count() or 1
    text = f"The load average is {load * cores:.1f} on {cores} cores, so this machine will be measured as too slow."
    users = _busiest_processes()
    return f"{text} Busy: {', '.join(users)}." if users else text


def _busiest_processes() -> list[str]:
    """'python (pid 4711) 98 %' of a core, within a moment, without this process; at most _SHOWN of them."""
    found = [one for one in psutil.process_iter() if one.pid != os.getpid()]
    for one in found:
        with contextlib.suppress(psutil.Error):
            one.cpu_percent()
    time.sleep(_LOOK_S)
    shares: list[tuple[float, str]] = []
    for one in found:
        with contextlib.suppress(psutil.Error):
            shares.append((one.cpu_percent(), f"{one.name()} (pid {one.pid})"))
    busy = sorted((share, name) for share, name in shares if share >= _BUSY_PERCENT)
    return [f"{name} {share:.0f} %" for share, name in reversed(busy[-_SHOWN:])]


def left_out_text(precisions: Sequence[str]) -> str:
    """What to say of precisions that were measured too far off to plan with; '' without any."""
    if not precisions:
        return ""
    listed = " and ".join(precisions)
    return (
        f"{listed}: too far off to plan with, so not kept, and 'powerband plan' leaves {listed} out here. For "
        f"{'them' if len(precisions) > 1 else 'it'}, calibrate again when no other programs run, or with --force."
    )


def check_fits(rows: Sequence[Mapping[str, Any]], host: HostModel | None, load_before: float) -> None:
    """Raises EnvironmentFault, with the reason, where one is not usable.

    rows, host: of a Calibration; rows that are not kept are no problem. load_before: load_per_core() before
    it began.
    """
    problems = list(_problems(rows, host))
    if not problems:
        return
    cores = os.cpu_count() or 1
    busy = f"The load average was {load_before * cores:.1f} on {cores} cores before it began: other programs run here. "
    raise EnvironmentFault(
        f"The calibration is too far off to plan with, and nothing was kept: {'; '.join(problems)}.",
        hint=(busy if load_before > _MAX_LOAD else "")
        + "Stop other programs and calibrate again, or with --force, which keeps whatever is measured.",
        code="poor_calibration",
        param="force",
    )


def _problems(rows: Sequence[Mapping[str, Any]], host: HostModel | None) -> Iterator[str]:
    for row in rows:
        if not row["kept"]:
            continue
        median, p90 = row["error"]["median"], row["error"]["p90"]
        if median > MAX_MEDIAN or p90 > MAX_P90:
            yield (
                f"{row['what']}: half of the steps are off by {median:.0%} or more, and one in ten by {p90:.0%} "
                f"(at most {MAX_MEDIAN:.0%} and {MAX_P90:.0%})"
            )
    if host is None:
        return
    for way, seconds in {"a request to the engine": host.arrival_s, "a token to its client": host.answer_s}.items():
        if seconds > MAX_WAY_S:
            yield f"the way of {way} takes {seconds * 1e3:.0f} ms (at most {MAX_WAY_S * 1e3:.0f} ms)"
