"""The latency model of the device that an engine runs on: from this machine's calibration, else from the catalog."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from powerband.cost.first_token import FirstTokenEstimate
from powerband.cost.latency import LatencyModel
from powerband.cost.memory import MemoryPlan
from powerband.cost.step_log import RunConfiguration
from powerband.errors import PowerbandError
from powerband.spec.deployment import Replica
from powerband.spec.hardware.catalog import load_catalog, local_profiles
from powerband.spec.hardware.profile import DeviceProfile
from powerband.spec.model.model_spec import ModelSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceEstimates:
    """refined: fitted to steps of this very model."""

    model: LatencyModel
    refined: bool

    def first_token(self, budget: int) -> FirstTokenEstimate:
        """For deadline admission: a refined estimate counts in full, any other at the optimistic end of its band."""
        return FirstTokenEstimate(self.model, budget, share=1.0 if self.refined else max(1.0 - self.model.band, 0.1))


def find_device_estimates(form: RunConfiguration, spec: ModelSpec, memory: MemoryPlan) -> DeviceEstimates | None:
    """None for an unknown device: then no request is refused for its deadline and no step is compared."""
    try:
        profile = _profile(form)
        if profile is None:
            return None
        replica = Replica(
            device=profile.name,
            quantization=form.quantization,
            kv_precision=form.kv_precision,
            max_model_len=memory.max_model_len,
            max_num_seqs=memory.max_num_seqs,
            max_num_batched_tokens=memory.max_num_batched_tokens,
        )
        model = LatencyModel(spec, profile, replica, "powerband")
    except PowerbandError as error:  # a broken profile does not prevent serving
        logger.warning("The latency model knows nothing of this device: %s", error.message)
        return None
    refined = profile.refinement(form.model, "powerband", form.quantization, form.kv_precision) is not None
    return DeviceEstimates(model, refined)


def _profile(form: RunConfiguration) -> DeviceProfile | None:
    for here in local_profiles():
        machine = here.machine
        if machine is not None and (machine.name, machine.threads) == (
            form.device_name,
            form.threads or machine.threads,
        ):
            return here
    if form.device == "cpu":
        return None
    return catalog_device(form.device_name)


def catalog_device(device_name: str) -> DeviceProfile | None:
    """A GPU by the name that its driver gives it."""
    called = {device_name.casefold(), device_name.removeprefix("NVIDIA ").casefold()}
    known = (profile for profile in load_catalog().profiles.values() if profile.kind != "cpu")
    return next((p for p in known if called & {name.casefold() for name in (p.name, *p.aliases)}), None)
