"""What a model is, what a device is, and what one engine is asked to be. No torch."""

from powerband.spec.model.model_spec import LayerSpec, ModelSpec, RopeSpec
from powerband.spec.model.reader import read_model_spec
from powerband.spec.settings import EngineSettings

__all__ = ["EngineSettings", "LayerSpec", "ModelSpec", "RopeSpec", "read_model_spec"]
