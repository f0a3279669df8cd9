"""A whole calibration: what to measure or to read from a log, and the profile that comes of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from powerband.calibration.curve_fit import scipy_optimize
from powerband.calibration.measure import (
    PRECISION_TEXTS,
    DeviceFits,
    ModelFit,
    fit_step_log,
    measure_machine,
    measure_model,
    with_refinement,
)
from powerband.calibration.operator_fit import PrecisionFit
from powerband.calibration.quality import ReportProgress, better_of_two
from powerband.cost.step_log import read_step_log
from powerband.errors import EnvironmentFault, UsageError
from powerband.extras import require
from powerband.spec.hardware.catalog import local_profile
from powerband.spec.hardware.profile import DeviceProfile, HostModel
from powerband.spec.settings import EngineSettings

_MACHINE_FRACTION = 0.6  # of the time; the rest is for the demo model


@dataclass(frozen=True, slots=True)
class Calibration:
    profile: DeviceProfile
    machine: DeviceFits | None  # None: the machine was known
    model: ModelFit | None

    @property
    def host(self) -> HostModel | None:
        return self.model.refinement.host if self.model is not None else None

    @property
    def left_out(self) -> tuple[PrecisionFit, ...]:
        """Fits of 8 and 4 bits that were too far off to plan with, and are not in the profile."""
        fits, kept = (self.machine.fits if self.machine is not None else ()), self.profile.gemm.get("powerband", {})
        return tuple(fit for fit in fits if fit.quantization not in kept)

    def rows(self) -> list[dict[str, Any]]:
        """What was fitted, with the errors of the fits, one row each."""
        rows: list[dict[str, Any]] = [
            {
                "what": f"any model, {PRECISION_TEXTS[found.quantization]}",
                "steps": found.steps,
                "bytes_per_s": found.bytes_per_s,
                "flops_per_s": found.flops_per_s,
                "error": asdict(found.held_out),
                "kept": found not in self.left_out,
            }
            for found in (self.machine.fits if self.machine is not None else ())
        ]
        if self.model is not None:
            refinement = self.model.refinement
            what = f"{refinement.name}, {PRECISION_TEXTS[refinement.quantization]}"
            rows.append({"what": what, "steps": self.model.steps, "error": asdict(self.model.errors), "kept": True})
        return rows

    def table(self) -> list[list[str]]:
        """The rows for people, with headings."""
        table = [["measured", "steps", "GB/s", "GFLOP/s", "error: median", "P90", "bias"]]
        for row in self.rows():
            rates = [f"{row[name] / 1e9:.1f}" if name in row else "" for name in ("bytes_per_s", "flops_per_s")]
            errors = [
                f"{row['error'][name]:+.1%}".lstrip("+" if name != "bias" else "") for name in ("median", "p90", "bias")
            ]
            what = row["what"] if row["kept"] else f"{row['what']}: not kept"
            table.append([what, str(row["steps"]), *rates, *errors])
        return table


def calibrate_machine(
    engine: EngineSettings,
    device: str,
    seconds: float,
    path: Path,
    report: ReportProgress,
    *,
    has_model: bool,
    force: bool = False,
) -> Calibration:
    """Measure the machine, unless `path` holds its profile and a model was named; then that model, or the demo model.

    seconds: for the machine and for the model together, or for a named model alone. What comes out too far off is
    measured once more. force: the profile has every precision, even one that is still too far off. Raises
    EnvironmentFault.
    """
    require("torch", "Calibration")
    scipy_optimize()
    profile, machine = local_profile(path) if has_model else None, None
    if profile is None:
        machine = measure_machine(device, engine.threads, _MACHINE_FRACTION * seconds, report, force=force)
        profile = machine.profile
    budget_s = seconds * (1 if has_model else 1 - _MACHINE_FRACTION)
    model = better_of_two(partial(measure_model, engine, budget_s), lambda fit: fit.errors, report)
    if machine is not None and model.refinement.host is not None:
        profile = replace(profile, host={**profile.host, "powerband": model.refinement.host})
    return Calibration(with_refinement(profile, model.refinement), machine, model)


def calibrate_from_log(log: Path, path: Path) -> Calibration:
    """Fit the steps of an engine's log. Raises UsageError if that engine ran on another machine than the profile."""
    scipy_optimize()
    profile = local_profile(path)
    if profile is None:
        raise EnvironmentFault(
            "A step log refines the profile of this machine, which has not been measured yet.",
            hint="Run 'powerband calibrate' first.",
            param="from",
        )
    model = None
    for run in read_step_log(log):
        machine = profile.machine
        if machine is not None and (run.form.device_name, run.form.threads) != (machine.name, machine.threads):
            raise UsageError(
                f"{log} is of {run.form.device_name} with {run.form.threads} threads; the profile is of {machine.name}"
                f" with {machine.threads}.",
                hint="Calibrate on the machine, and with the threads, on which the engine ran.",
                param="from",
            )
        model = fit_step_log(profile, run)
        profile = with_refinement(profile, model.refinement)
    return Calibration(profile, None, model)
