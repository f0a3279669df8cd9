"""From a plan's replica to an engine's command line; its options are compared with each engine's own list."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_configs import model_config
from powerband.cli.main import main
from powerband.engines.launch import Command, LaunchRequest
from powerband.engines.registry import ADAPTERS
from powerband.errors import EnvironmentFault, UsageError
from powerband.spec.deployment import ENGINES, EngineName, Replica

DOCUMENTED = Path(__file__).parent / "documented_options"
H100 = Replica(device="H100-SXM", max_model_len=4096, max_num_seqs=64, max_num_batched_tokens=1024)
CPU = Replica(device="cpu", max_model_len=128, max_num_seqs=4, max_num_batched_tokens=256)
LLAMA = model_config(architectures=["LlamaForCausalLM"], rope_theta=500000.0)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return _model(tmp_path / "llama")


@pytest.fixture(autouse=True)
def _programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine is installed, as far as anybody can tell."""
    for name in ("vllm", "sglang", "trtllm-serve"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("POWERBAND_CACHE", str(tmp_path / "cache"))
    for name in ("VLLM", "SGLANG", "TRTLLM"):
        monkeypatch.delenv(f"POWERBAND_{name}", raising=False)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_every_option_is_in_the_engines_documentation(engine: EngineName, model: str, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    replica = replace(H100, tensor_parallel=2, pipeline_parallel=2, expert_parallel=2, enable_prefix_caching=False)
    replica = replace(replica, draft_tokens=3, offload_share=0.0 if engine == "trtllm" else 0.5)
    command = _command(
        engine, model, replica, draft_method="ngram", api_key_file=None if engine == "trtllm" else str(key)
    )
    documented = set((DOCUMENTED / f"{engine}.txt").read_text().split())
    asked = {word for word in command if word.startswith("--")}
    assert len(asked) > 12
    assert asked - documented == set()


def test_vllm_gets_every_setting_of_the_plan(model: str) -> None:
    options = _options(
        _command("vllm", model, replace(H100, tensor_parallel=2, quantization="fp8", kv_precision="fp8"))
    )
    assert options["--tensor-parallel-size"] == "2"
    assert options["--quantization"] == options["--kv-cache-dtype"] == "fp8"
    assert (options["--max-model-len"], options["--max-num-seqs"]) == ("4096", "64")
    assert options["--gpu-memory-utilization"] == "0.9"


def test_vllm_offloads_a_fraction_of_the_layers_of_each_gpu(model: str) -> None:
    whole = _options(_command("vllm", model, replace(H100, offload_share=1.0)))
    half = _options(_command("vllm", model, replace(H100, offload_share=0.5, tensor_parallel=2)))
    assert float(whole["--cpu-offload-gb"]) == pytest.approx(13.0, abs=0.1)  # 6.98e9 parameters in layers, 16 bits
    assert float(half["--cpu-offload-gb"]) == pytest.approx(13.0 / 4, abs=0.1)


def test_vllm_on_a_cpu_gets_threads_and_the_memory_for_its_longest_requests(model: str) -> None:
    invocation = _launch("vllm", model, CPU, threads=2)
    options = _options(invocation.command)
    assert invocation.env == {"OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    assert int(options["--kv-cache-memory-bytes"]) == 4 * 128 * 131072  # 128 KiB a token
    assert "--gpu-memory-utilization" not in options


def test_a_key_is_not_on_vllms_command_line(model: str, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")
    invocation = _launch("vllm", model, H100, api_key_file=str(key))
    assert invocation.env["VLLM_API_KEY"] == "secret"
    assert "secret" not in " ".join(invocation.command)


def test_sglangs_memory_fraction_counts_weights_and_kv_cache(model: str) -> None:
    options = _options(_command("sglang", model, H100))
    assert 0.7 < float(options["--mem-fraction-static"]) < 0.9
    assert options["--chunked-prefill-size"] == "1024"


def test_trtllm_settings_without_an_option_are_in_its_file(model: str) -> None:
    replica = replace(H100, draft_tokens=4, enable_prefix_caching=False)
    options = _options(_command("trtllm", model, replica, draft_method="ngram"))
    told = yaml.safe_load(Path(options["--config"]).read_text())
    assert told["kv_cache_config"] == {"enable_block_reuse": False, "dtype": "auto"}
    assert told["speculative_config"] == {"decoding_type": "NGram", "max_draft_len": 4}
    assert 0.8 < float(options["--kv_cache_free_gpu_memory_fraction"]) < 1


def test_powerband_accepts_the_command_of_its_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    command = _command("powerband", "demo", replace(CPU, quantization="int8", kv_precision="int8"), threads=1)
    assert command[1:4] == ("-m", "powerband", "serve")
    about_the_server = ("--host", "--port")
    flags = [word for word in command[5:] if not word.startswith(about_the_server)]
    assert main(["config", "show", command[4], *flags, "--json"]) == 0
    shown = {item["setting"]: item["value"] for item in _listed(json.loads(capsys.readouterr().out))}
    assert (shown["quantization"], shown["kv_cache_dtype"], shown["threads"]) == ("int8", "int8", 1)
    assert (shown["max_num_seqs"], shown["max_model_len"], shown["served_model_name"]) == (4, 128, "m")


@pytest.mark.parametrize(
    ("engine", "changes", "named"),
    [
        ("powerband", {"tensor_parallel": 2}, "tensor_parallel: 2"),
        ("powerband", {"offload_share": 0.5}, "offload_share: 0.5"),
        ("powerband", {"draft_tokens": 2}, "draft_tokens: 2"),
        ("powerband", {"kv_precision": "fp8"}, "kv_precision: fp8"),
        ("vllm", {"kv_precision": "int8"}, "kv_precision: int8"),
        ("vllm", {"quantization": "w8a8"}, "quantization: w8a8"),
        ("sglang", {"long_prefill_token_threshold": 512}, "long_prefill_token_threshold: 512"),
        ("sglang", {"quantization": "int4"}, "quantization: int4"),
        ("trtllm", {"quantization": "fp8"}, "quantization: fp8"),
        ("trtllm", {"offload_share": 0.5}, "offload_share: 0.5"),
        ("vllm", {"draft_tokens": 2}, "no method"),
    ],
)
def test_an_error_names_the_unsupported_setting(
    engine: EngineName, changes: dict[str, Any], named: str, model: str
) -> None:
    with pytest.raises(UsageError, match=named):
        _command(engine, model, replace(H100, **changes))


def test_weights_stored_as_planned_need_no_option(tmp_path: Path) -> None:
    stored = _model(tmp_path / "fp8", quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})
    assert "--quantization" not in _options(_command("vllm", stored, replace(H100, quantization="fp8")))
    with pytest.raises(UsageError, match="quantization: none"):
        _command("vllm", stored, H100)


def test_finds_the_engines_program(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _command("vllm", model, H100)[:3] == (str(tmp_path / "bin" / "vllm"), "serve", model)
    assert _command("vllm", model, H100, executable=("/bin/true", "-x"))[:2] == ("/bin/true", "-x")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/bin/true")
    monkeypatch.setenv("POWERBAND_VLLM", str(tmp_path / "venv"))
    assert _command("vllm", model, H100)[:3] == (str(python), "-m", "vllm.entrypoints.openai.api_server")
    monkeypatch.setenv("POWERBAND_VLLM", str(tmp_path / "nowhere"))
    with pytest.raises(EnvironmentFault, match="neither an environment nor a program"):
        _command("vllm", model, H100)
    monkeypatch.delenv("POWERBAND_VLLM")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EnvironmentFault, match="vllm is not on the PATH") as caught:
        _command("vllm", model, H100)
    assert "POWERBAND_VLLM" in caught.value.hint


def test_every_engine_of_a_plan_has_an_adapter() -> None:
    assert [ADAPTERS[engine].name for engine in ENGINES] == list(ENGINES)


def _model(folder: Path, **more: Any) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**LLAMA, **more}))
    return str(folder)


def _command(engine: EngineName, model: str, replica: Replica, **more: Any) -> tuple[str, ...]:
    return _launch(engine, model, replica, **more).command


def _launch(engine: EngineName, model: str, replica: Replica, **more: Any) -> Command:
    adapter = ADAPTERS[engine]
    values = {"model": model, "replica": replica, "port": "{port}", "served_name": "m", **more}
    return adapter.command(LaunchRequest(engine=engine, capabilities=adapter.capabilities, **values))


def _options(command: tuple[str, ...]) -> dict[str, str]:
    pairs = zip(command, (*command[1:], ""), strict=True)
    return {word: value for word, value in pairs if word.startswith("--")}


def _listed(shown: Any) -> list[dict[str, Any]]:
    return shown if isinstance(shown, list) else [{"setting": name, **item} for name, item in shown.items()]
