"""The model that a command plans for."""

from __future__ import annotations

from powerband.cli.model.memory import config_source
from powerband.spec.model.checkpoint_precision import CheckpointPrecision, read_for_planning
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.settings import EngineSettings


def read_model(name: str) -> tuple[ModelSpec, CheckpointPrecision]:
    """A model by its Hugging Face id, folder or config.json, or 'demo'; and the precision of its weights.

    Any model that some engine can load. Raises UsageError or EnvironmentFault.
    """
    source = config_source(EngineSettings(model=name))
    return read_for_planning(source / "config.json" if source.is_dir() else source)
