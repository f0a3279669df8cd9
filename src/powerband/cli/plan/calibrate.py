"""`powerband calibrate`: measure this machine, so that planning and admission know it."""

from __future__ import annotations

import json as json_format
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from cyclopts import Group, Parameter

from powerband.cli.flags import Json, takes_settings
from powerband.cli.machine import compute_device
from powerband.cli.settings import Resolved
from powerband.cli.tables import print_table
from powerband.cost.step_log import read_step_log
from powerband.errors import EnvironmentFault, UsageError
from powerband.files import write_atomically
from powerband.spec.hardware.catalog import local_profile, local_profile_path
from powerband.spec.hardware.profile import DeviceProfile
from powerband.spec.settings import EngineSettings

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from powerband.calibration.measure import DeviceFits, ModelFit

DEFAULT_SECONDS = 45.0
IGNORED_SETTINGS = ("step_log", "scheduling_policy", "served_model_name", "chat_template")
_MACHINE_RATIO = 0.6  # of the time, beside the demo model's
_NAMES = {"none": "16 bits", "int8": "int8", "int4": "int4"}
_MEASURING = Group("Measuring", sort_key=0)


@takes_settings(EngineSettings, without=IGNORED_SETTINGS)
def calibrate(
    settings: Resolved,
    *,
    from_log: Annotated[
        Path | None,
        Parameter(name="--from", help="Take steps from an engine's step log; nothing runs", group=_MEASURING),
    ] = None,
    seconds: Annotated[
        float, Parameter(help="Time to spend on steps, of the machine and of MODEL each", group=_MEASURING)
    ] = DEFAULT_SECONDS,
    out: Annotated[
        Path | None, Parameter(name=("--out", "-o"), help="File; default: this machine's profile", group=_MEASURING)
    ] = None,
    json: Annotated[Json, Parameter(group=_MEASURING)] = False,
) -> int:
    """Measure this machine, and keep what was found as the device 'here'.

    Without MODEL: its laws for any model, by timing small made-up ones in each precision.
    With MODEL: its own steps too, alone and under load behind its API, which is much nearer.
    Best on an idle machine; about two minutes on a CPU.
    """
    began_s = time.perf_counter()
    if not 1 <= seconds <= 3600:
        raise UsageError(f"seconds is {seconds:g}.", hint="It lies between 1 and 3600.", param="seconds")
    path = out or local_profile_path()
    if from_log is not None:
        profile, report = _from_log(from_log, path)
    else:
        profile, report = _measure(settings, seconds, path)
    write_profile(profile, path)
    _print(report, path, time.perf_counter() - began_s, as_json=json)
    return 0


def _measure(settings: Resolved, seconds: float, path: Path) -> tuple[DeviceProfile, CalibrationReport]:
    """The machine, unless MODEL is given and the machine is known; then MODEL, or the demo model in its place."""
    from powerband.calibration.measure import measure_machine, measure_model, with_refinement

    engine = settings.engine
    profile = local_profile(path) if "model" in settings.asked else None
    report = CalibrationReport()
    with _ProgressBar() as bar:
        if profile is None:
            device = compute_device(engine)
            machine = measure_machine(device, engine.threads, _MACHINE_RATIO * seconds, bar)
            profile, report.machine = machine.profile, machine
        report.model = measure_model(engine, seconds * (1 if "model" in settings.asked else 1 - _MACHINE_RATIO), bar)
    host = report.model.refinement.host
    if report.machine is not None and host is not None:
        profile = replace(profile, host={**profile.host, "powerband": host})
    return with_refinement(profile, report.model.refinement), report


def _from_log(log: Path, path: Path) -> tuple[DeviceProfile, CalibrationReport]:
    """Raises UsageError where the log's engine ran on another machine than the profile's."""
    from powerband.calibration.measure import fit_step_log, with_refinement

    profile = local_profile(path)
    if profile is None:
        raise EnvironmentFault(
            "A step log refines the profile of this machine, which has not been measured yet.",
            hint="Run 'powerband calibrate' first.",
            param="from",
        )
    report = CalibrationReport()
    for run in read_step_log(log):
        machine = profile.machine
        if machine is not None and (run.form.device_name, run.form.threads) != (machine.name, machine.threads):
            raise UsageError(
                f"{log} is of {run.form.device_name} with {run.form.threads} threads; the profile is of {machine.name}"
                f" with {machine.threads}.",
                hint="Calibrate on the machine, and with the threads, on which the engine ran.",
                param="from",
            )
        report.model = fit_step_log(profile, run)
        profile = with_refinement(profile, report.model.refinement)
    return profile, report


def write_profile(profile: DeviceProfile, path: Path) -> None:
    """All or nothing. Raises EnvironmentFault."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, yaml.safe_dump(profile.as_dict(), sort_keys=False, allow_unicode=True).encode())
    except OSError as problem:
        raise EnvironmentFault(f"Cannot write {path}: {problem.strerror}.", param="out") from None


@dataclass
class CalibrationReport:
    """What there is to print."""

    machine: DeviceFits | None = None
    model: ModelFit | None = None

    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [
            {
                "what": f"any model, {_NAMES[found.quantization]}",
                "steps": found.steps,
                "bytes_per_s": found.bytes_per_s,
                "flops_per_s": found.flops_per_s,
                "error": asdict(found.held_out),
            }
            for found in (self.machine.fits if self.machine is not None else ())
        ]
        if self.model is not None:
            refinement = self.model.refinement
            what = f"{refinement.name}, {_NAMES[refinement.quantization]}"
            rows.append({"what": what, "steps": self.model.steps, "error": asdict(self.model.errors)})
        return rows


def _print(report: CalibrationReport, path: Path, took_s: float, *, as_json: bool) -> None:
    rows = report.rows()
    if as_json:
        print(json_format.dumps({"profile": str(path), "seconds": took_s, "measured": rows}, indent=1))
        return
    table = [["measured", "steps", "GB/s", "GFLOP/s", "error: median", "P90", "bias"]]
    for row in rows:
        rates = [f"{row[name] / 1e9:.1f}" if name in row else "" for name in ("bytes_per_s", "flops_per_s")]
        errors = [
            f"{row['error'][name]:+.1%}".lstrip("+" if name != "bias" else "") for name in ("median", "p90", "bias")
        ]
        table.append([row["what"], str(row["steps"]), *rates, *errors])
    print_table(table)
    host = report.model.refinement.host if report.model is not None else None
    if host is not None:
        print(
            f"host: {1e3 * host.step_s:.2f} ms a step and {1e6 * host.per_request_s:.0f} µs a request in it;"
            f" {1e3 * host.arrival_s:.1f} ms until the engine knows a request, {1e3 * host.answer_s:.1f} ms back"
        )
    print(f"errors: of steps that the fit had not seen. {took_s:.0f} s; kept in {path}")


class _ProgressBar:
    """What is being measured, on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._progress: Progress = Progress(
            TimeElapsedColumn(),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: TaskID = self._progress.add_task("start", total=1.0)

    def __call__(self, what: str, share: float) -> None:
        self._progress.update(self._task, description=what, completed=share)

    def __enter__(self) -> _ProgressBar:
        self._progress.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._progress.__exit__(kind, error, trace)
