"""What commands that plan share: models and devices by the names that users give them."""

from __future__ import annotations

from pathlib import Path

from powerband.cli.memory import config_source
from powerband.spec.catalog import load_catalog
from powerband.spec.model import ModelSpec
from powerband.spec.profile import DeviceProfile
from powerband.spec.reader import read_model_spec
from powerband.spec.settings import EngineSettings


def model_spec(model: str) -> ModelSpec:
    """Of a Hugging Face id, a folder, a config.json, or 'demo'. Raises UsageError or EnvironmentFault."""
    return read_model_spec(config_source(EngineSettings(model=model)))


def find_device(name: str) -> DeviceProfile:
    """Raises UsageError or EnvironmentFault, see spec.catalog."""
    return load_catalog().find(name)


def device_names(text: str) -> list[str]:
    """'L4, A100' → ['L4', 'A100'], each once."""
    return list(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))


def is_file(text: str) -> bool:
    """Whether a name is meant as a path."""
    return Path(text).suffix != "" and Path(text).exists()
