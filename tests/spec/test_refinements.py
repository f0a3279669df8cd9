"""What a device's profile knows of one model."""

from __future__ import annotations

from dataclasses import replace

from powerband.spec.hardware.profile import DeviceProfile, Evidence, MeasuredMachine, Refinement, StepTimeModel
from powerband.spec.model.reader import read_model_spec

STEPS = StepTimeModel(
    tokens=(1, 64),
    token_s=(0.001, 0.002),
    rows=(1,),
    row_s=(0.001,),
    positions=(0, 100000),
    position_s=(1e-4, 0.0101),
    decode_s=1e-5,
    chunk_s=1e-4,
    pair_s=1e-8,
    read_s=1e-7,
)
REFINEMENT = Refinement(model="abc", name="demo", steps=STEPS, evidence=Evidence(source="measured", error=0.1))
PROFILE = DeviceProfile(
    name="local",
    kind="cpu",
    architecture="cpu",
    memory_bytes=2**34,
    bandwidth_bytes_per_s=40e9,
    peak_flops_per_s={"16bit": 1e12},
    multiprocessors=2,
    machine=MeasuredMachine(name="Xeon", features=("amx_bf16",), cores=2, threads=2, date="2026-11-21"),
    refinements=(REFINEMENT,),
)


def test_only_the_same_model_in_the_same_form_is_refined() -> None:
    assert PROFILE.refinement("abc", "powerband", "none", "16bit") == REFINEMENT
    assert PROFILE.refinement("abc", "powerband", "int8", "int8") is None
    assert PROFILE.refinement("abd", "powerband", "none", "16bit") is None


def test_a_refined_profile_survives_its_file() -> None:
    assert DeviceProfile.from_dict(PROFILE.as_dict()) == PROFILE


def test_the_digest_names_the_shape_and_nothing_else() -> None:
    spec = read_model_spec("src/powerband/demo")
    assert replace(spec, eos_token_ids=(7,)).shape_digest == spec.shape_digest
    assert replace(spec, vocab_size=4160).shape_digest != spec.shape_digest
