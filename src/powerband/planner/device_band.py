"""How well the speed of a device is known: the band of a plan of a usual model on it, and what the band rests on."""

from __future__ import annotations

from typing import Literal, NamedTuple

from powerband.cost.latency import LatencyModel
from powerband.spec.deployment import EngineName, Replica
from powerband.spec.hardware.profile import DeviceProfile
from powerband.spec.model.model_spec import LayerSpec, ModelSpec

# As Llama 3 8B.
_USUAL_MODEL = ModelSpec(
    family="llama",
    dtype="bfloat16",
    vocab_size=128256,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    max_position=8192,
    norm_eps=1e-5,
    tie_embeddings=False,
    layers=(LayerSpec(window=None, rope=None),) * 32,
)


class DeviceBand(NamedTuple):
    """share: see LatencyModel.band. evidence: whether products and attention were measured on such a device."""

    share: float
    evidence: Literal["measured", "partly measured", "prior"]


def device_band(profile: DeviceProfile, engine: EngineName) -> DeviceBand:
    """The band of a dense model of 8 billion parameters in 16 bits on one device."""
    replica = Replica(device=profile.name, max_model_len=8192)
    model = LatencyModel(_USUAL_MODEL, profile, replica, engine)
    measured = [not one.is_prior for one in model.evidence]
    if all(measured):
        return DeviceBand(model.band, "measured")
    return DeviceBand(model.band, "partly measured" if any(measured) else "prior")
