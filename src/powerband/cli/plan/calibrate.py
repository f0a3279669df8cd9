"""`powerband calibrate`: measure this machine, so that planning and admission know it."""

from __future__ import annotations

import json as json_format
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from powerband.cli.flags import Json, takes_settings
from powerband.cli.progress import progress_bar
from powerband.cli.tables import print_table
from powerband.engine.this_machine import compute_device
from powerband.errors import UsageError
from powerband.spec.hardware.catalog import check_profile_can_be_written, local_profile_path, write_profile
from powerband.spec.settings import EngineSettings
from powerband.spec.settings_layers import Resolved

if TYPE_CHECKING:
    from powerband.calibration.session import Calibration

DEFAULT_SECONDS = 45.0
IGNORED_SETTINGS = (
    "step_log",
    "scheduling_policy",
    "served_model_name",
    "chat_template",
    "tool_call_parser",
    "reasoning_parser",
)
_MEASURING = Group("Measuring", sort_key=0)


@takes_settings(EngineSettings, without=IGNORED_SETTINGS)
def calibrate(
    settings: Resolved,
    *,
    from_log: Annotated[
        Path | None,
        Parameter(name="--from", help="Use the steps of an engine's step log; runs nothing", group=_MEASURING),
    ] = None,
    seconds: Annotated[
        float, Parameter(help="Time for measuring steps, of the machine and of MODEL each", group=_MEASURING)
    ] = DEFAULT_SECONDS,
    out: Annotated[
        Path | None,
        Parameter(name=("--out", "-o"), help="Output file; default: this machine's profile", group=_MEASURING),
    ] = None,
    force: Annotated[
        bool, Parameter(help="Keep the result even if its predictions are far off", negative="", group=_MEASURING)
    ] = False,
    json: Annotated[Json, Parameter(group=_MEASURING)] = False,
) -> int:
    """Measure this machine, and keep the result as the device 'local'.

    Without MODEL: performance models for any model, from small synthetic ones in each precision.
    With MODEL: also its own steps, alone and under load behind its API, which is much more accurate.
    With --threads: for replicas that share the cores; kept beside the measurement with all cores.
    Best on an idle machine; about two minutes on a CPU, and one to three more where the kernels are
    not compiled yet. What turns out too far off is measured once more; then int8 or int4 is left out,
    and anything else refused.
    """
    began_s = time.perf_counter()
    if not 1 <= seconds <= 3600:
        raise UsageError(f"seconds is {seconds:g}.", hint="It lies between 1 and 3600.", param="seconds")
    from powerband.engine.model_loader.checkpoint import check_local_model, resolve_model

    if from_log is None and "model" in settings.asked:  # what is not there is said, or fetched, before minutes pass
        check_local_model(settings.engine)
        resolve_model(settings.engine)
    from powerband.calibration.quality import check_fits, load_per_core

    path = out or local_profile_path(_threads(settings.engine, from_log))
    check_profile_can_be_written(path)
    load_before = load_per_core()
    if from_log is None:
        _announce(load_before)
    found = _calibrated(settings, from_log, seconds, path, force=force)
    if not force:
        check_fits(found.rows(), found.host, load_before)
    write_profile(found.profile, path)
    _print(found, path, time.perf_counter() - began_s, as_json=json)
    _warn(found)
    return 0


def calibrate_machine_once(threads: int | None) -> None:
    """What the command does without a model, for commands that need it. threads: of an engine; None: all cores."""
    from powerband.calibration.quality import check_fits, load_per_core
    from powerband.calibration.session import calibrate_machine

    engine, path, load_before = (
        EngineSettings(model="demo", threads=threads),
        local_profile_path(threads),
        load_per_core(),
    )
    _announce(load_before)
    with progress_bar() as report:
        found = calibrate_machine(engine, compute_device(engine), DEFAULT_SECONDS, path, report, has_model=False)
    check_fits(found.rows(), found.host, load_before)
    write_profile(found.profile, path)
    print(f"· measured, and kept in {path}", file=sys.stderr)
    _warn(found)


def _warn(found: Calibration) -> None:
    """Of precisions that were left out."""
    from powerband.calibration.measure import PRECISION_TEXTS
    from powerband.calibration.quality import left_out_text

    if text := left_out_text([PRECISION_TEXTS[fit.quantization] for fit in found.left_out]):
        print(f"· {text}", file=sys.stderr)


def _announce(load: float) -> None:
    """What takes long, and what will spoil it. load: load_per_core()."""
    from powerband.calibration.quality import busy_text

    print("· measuring this machine", file=sys.stderr)
    if busy := busy_text(load):
        print(f"· {busy}", file=sys.stderr)


def _threads(engine: EngineSettings, from_log: Path | None) -> int | None:
    """Of the engine that is measured, or that wrote the log."""
    if from_log is None:
        return engine.threads
    from powerband.cost.step_log import read_step_log

    return read_step_log(from_log)[0].form.threads


def _calibrated(settings: Resolved, from_log: Path | None, seconds: float, path: Path, *, force: bool) -> Calibration:
    from powerband.calibration.session import calibrate_from_log, calibrate_machine

    if from_log is not None:
        return calibrate_from_log(from_log, path)
    engine = settings.engine
    with progress_bar() as report:
        return calibrate_machine(
            engine,
            compute_device(engine),
            seconds,
            path,
            report,
            has_model="model" in settings.asked,
            force=force,
        )


def _print(found: Calibration, path: Path, took_s: float, *, as_json: bool) -> None:
    rows = found.rows()
    if as_json:
        print(json_format.dumps({"profile": str(path), "seconds": took_s, "measured": rows}, indent=1))
        return
    print_table(found.table())
    host = found.host
    if host is not None:
        print(
            f"host: {1e3 * host.step_s:.2f} ms a step and {1e6 * host.per_request_s:.0f} µs a request in it;"
            f" {1e3 * host.arrival_s:.1f} ms until the engine knows a request, {1e3 * host.answer_s:.1f} ms back"
        )
    print(f"errors: of steps that the fit had not seen. {took_s:.0f} s; kept in {path}")
