"""The model that a command plans for, and the devices."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from powerband.engine.this_machine import config_source
from powerband.errors import EnvironmentFault
from powerband.spec.hardware.catalog import NOT_MEASURED, needed_threads
from powerband.spec.hardware.profile import DeviceProfile
from powerband.spec.hardware.what_if import chosen_devices
from powerband.spec.model.checkpoint_precision import CheckpointPrecision, read_for_planning
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.settings import EngineSettings


def read_model(name: str) -> tuple[ModelSpec, CheckpointPrecision]:
    """A model by its Hugging Face id, folder or config.json, or 'demo'; and the precision of its weights.

    Any model that some engine can load. Raises UsageError or EnvironmentFault.
    """
    source = config_source(EngineSettings(model=name))
    return read_for_planning(source / "config.json" if source.is_dir() else source)


def measured_devices(
    text: str,
    prices: Path | None,
    changes: Sequence[str],
    replicas: int | None = None,
    providers: str | None = None,
) -> list[DeviceProfile]:
    """As chosen_devices. On a terminal, a machine that is planned for and was not measured yet is measured first."""
    try:
        return chosen_devices(text, prices, changes, replicas, providers)
    except EnvironmentFault as error:
        if error.code != NOT_MEASURED or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        print(f"· {error.message} Measuring it now, once; Ctrl-C stops it.", file=sys.stderr)
    from powerband.cli.plan.calibrate import calibrate_machine_once

    calibrate_machine_once(needed_threads(replicas))
    return chosen_devices(text, prices, changes, replicas, providers)
