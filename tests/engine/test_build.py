"""From settings to an engine: what is derived, what is refused, and what the start reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines_for_tests import SMALL, TestEngine
from models_for_tests import random_model, save

from powerband.core.step import FinishReason
from powerband.cost.precision import auto_dtype
from powerband.cost.step_log import read_step_log
from powerband.engine.attention import choose_backend
from powerband.engine.executor.local import TorchExecutor
from powerband.engine.kernels.cpu.library import Status as KernelStatus
from powerband.errors import EnvironmentFault, UsageError
from powerband.spec.model.reader import read_model_spec

KERNELS = KernelStatus("plain", "compiled for this processor")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model("llama2"), tmp_path_factory.mktemp("llama2"))


def configured(folder: Path, target: Path, **changes: Any) -> Path:
    """A folder with only a changed config.json."""
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_reports_memory_and_seconds_of_each_phase(folder: Path) -> None:
    phases: list[str] = []
    with TestEngine(folder, progress=lambda name, _fraction: phases.append(name)) as engine:
        built = engine.engine
    assert list(dict.fromkeys(phases)) == ["resolve", "kernels", "load", "prepare", "kv_cache"]
    assert list(built.report.seconds) == ["resolve", "kernels", "plan", "load", "prepare", "kv_cache"]
    assert built.report.weights_bytes == built.memory.parts["weights"]
    assert built.info.kv_capacity_tokens == built.memory.num_blocks * SMALL["block_size"]
    for part in ("llama", "weights", "KV cache", "reference", "load "):
        assert part in built.info.summary


def test_dummy_weights_need_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    with TestEngine(configured(folder, tmp_path), load_format="dummy", seed=3) as engine:
        assert len(engine.generate([[1, 2, 3]])[0]) == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_generates(folder: Path, dtype: str) -> None:
    with TestEngine(folder, dtype=dtype) as engine:
        assert engine.engine.executor.runner.model.embedding.weight.dtype == getattr(torch, dtype)
        assert len(engine.generate([[1, 2, 3], list(range(30))])[1]) == 8


@pytest.mark.parametrize(
    ("stored", "features", "expected"),
    [
        ("bfloat16", ("avx512_bf16",), "bfloat16"),
        ("float16", ("amx_bf16",), "bfloat16"),
        ("bfloat16", ("avx2",), "float32"),
        ("float32", ("avx512_bf16",), "float32"),
    ],
)
def test_auto_dtype_on_a_cpu(
    folder: Path, tmp_path: Path, stored: str, features: tuple[str, ...], expected: str
) -> None:
    spec = read_model_spec(configured(folder, tmp_path, dtype=stored))
    assert auto_dtype(spec, "cpu", features) == expected
    assert auto_dtype(spec, "cpu", features, kernels=True) == ("float32" if stored == "float32" else "bfloat16")
    assert auto_dtype(spec, "cpu", features, quantization="int8") == "bfloat16"


def test_settings_in_effect_are_filled_in(folder: Path) -> None:
    with TestEngine(folder, dtype="auto", device="auto", max_model_len=None) as engine:
        config = engine.engine.info.config
    assert (config["dtype"], config["device"], config["async_scheduling"]) == ("float32", "cpu", False)
    assert config["max_model_len"] == engine.engine.info.max_model_len


def test_stops_at_the_models_end_of_text(folder: Path, tmp_path: Path) -> None:
    with TestEngine(folder) as engine:
        expected = engine.generate([[1, 2, 3]])[0]
        id = engine.add([1, 2, 3], eos_token_ids=[expected[2]])
        outputs = engine.run()[id]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert outputs[-1].stop_token_id == expected[2]


def test_a_gpu_that_is_not_there(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EnvironmentFault, match="no GPU here") as caught:
        TestEngine(folder, device="cuda", threads=None)
    assert "doctor" in caught.value.hint


def test_quantization_that_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quantized with 'hqq'"):
        TestEngine(configured(folder, tmp_path, quantization_config={"quant_method": "hqq"}))


def test_too_little_memory_for_the_cache_names_three_ways_out(folder: Path) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        TestEngine(folder, kv_cache_memory="64KiB", max_model_len=512)
    assert all(f"({number})" in caught.value.hint for number in (1, 2, 3))


def test_memory_that_runs_out_while_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_self: TorchExecutor) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr(TorchExecutor, "start", start)
    with pytest.raises(EnvironmentFault, match="Out of memory") as caught:
        TestEngine(folder)
    assert "weights" in caught.value.message
    assert all(f"({number})" in caught.value.hint for number in (1, 2, 3))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "bfloat16, not float32"),
        ({"block_size": 16}, "blocks of 32 tokens, not 16"),
        ({"head_dim": 80}, "multiple of 32, at most 256, not 80"),
        ({"head_dim": 288}, "multiple of 32, at most 256, not 288"),
    ],
    ids=str,
)
def test_choice_of_attention_says_why(changes: dict[str, Any], reason: str) -> None:
    assert choose_backend("auto", "cpu", KERNELS).name == "cpu"
    choice = choose_backend("auto", "cpu", KERNELS, **changes)
    assert choice.name == "reference"
    assert reason in choice.reason
    with pytest.raises(EnvironmentFault, match=reason):
        choose_backend("cpu", "cpu", KERNELS, **changes)


def test_without_kernels_plain_torch_attends() -> None:
    choice = choose_backend("auto", "cpu", KernelStatus(None, "no compiler"))
    assert choice.name == "reference"
    assert "no compiler" in choice.reason
    assert choose_backend("reference", "cpu", KERNELS).reason == "asked for"


def test_kernels_for_cpus_do_not_run_on_gpus() -> None:
    with pytest.raises(EnvironmentFault, match="the device is a GPU"):
        choose_backend("cpu", "cuda", KERNELS)


def test_triton_needs_a_gpu() -> None:
    with pytest.raises(EnvironmentFault, match="it needs a GPU"):
        choose_backend("triton", "cpu", KERNELS)


def test_step_log_holds_the_shape_of_every_step(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    with TestEngine(folder, step_log=str(path), max_num_batched_tokens=32) as engine:
        engine.generate([list(range(40)), [7, 8]], max_tokens=4)
    header, *steps = [json.loads(line) for line in path.read_text().splitlines()]
    assert (header["step_log"], header["form"]["model"]) == (1, engine.engine.spec.shape_digest)
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert (steps[0]["new"], steps[0]["context"], steps[0]["sampled"]) == ([32], [32], 0)
    assert 4 <= steps[0]["kv_used"] <= 6 < steps[0]["kv_total"] == engine.engine.memory.num_blocks
    assert (steps[1]["new"], steps[1]["context"], steps[1]["sampled"]) == ([8, 2], [40, 2], 2)
    assert all(step["s"] > 0 for step in steps)
    assert sum(step["sampled"] for step in steps) == 8


def test_step_log_can_be_read_while_the_engine_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("powerband.engine.step_log._FLUSH_S", 0.0)
    path = tmp_path / "steps.jsonl"
    with TestEngine(folder, step_log=str(path)) as engine:
        engine.generate([[1, 2, 3]])
        assert read_step_log(path)[0].samples


def test_step_log_is_bounded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("powerband.engine.step_log.StepLog.__init__.__kwdefaults__", {"limit_bytes": 2000})
    path = tmp_path / "steps.jsonl"
    with TestEngine(folder, step_log=str(path)) as engine:
        engine.generate([[1]], max_tokens=100)
    old = tmp_path / "steps.jsonl.1"
    assert sorted(tmp_path.iterdir()) == [path, old]
    assert max(path.stat().st_size, old.stat().st_size) <= 2000
    assert read_step_log(path)[0].form == read_step_log(old)[0].form == engine.engine.form
    last = json.loads(path.read_text().splitlines()[-1])
    assert last["step"] == 100


def test_step_log_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="cannot be written") as caught:
        TestEngine(folder, step_log=str(tmp_path / "no" / "such" / "folder"))
    assert caught.value.param == "step_log"
