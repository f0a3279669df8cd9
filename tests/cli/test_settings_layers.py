"""Where a setting comes from: command line, then environment, then file, then default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from powerband.cli.main import main
from powerband.errors import EnvironmentFault, UsageError
from powerband.gateway.settings import GatewaySettings
from powerband.renamed import warn_renamed
from powerband.server.settings import ServerSettings
from powerband.spec.settings import EngineSettings
from powerband.spec.settings_layers import Resolved, resolve

KNOWN = (EngineSettings, ServerSettings)


def resolved(file: Path | None = None, environment: dict[str, str] | None = None, **given: Any) -> Resolved:
    return resolve([EngineSettings], KNOWN, given, environment or {}, file)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


def test_command_line_wins_over_environment_over_file_over_default(file: Path) -> None:
    file.write_text("max_num_seqs: 1\nblock_size: 1\nseed: 1\n")
    environment = {"POWERBAND_MAX_NUM_SEQS": "2", "POWERBAND_BLOCK_SIZE": "2"}
    settings = resolved(file, environment, max_num_seqs=3)
    assert (settings.engine.max_num_seqs, settings.origins["max_num_seqs"]) == (3, "command line")
    assert (settings.engine.block_size, settings.origins["block_size"]) == (2, "environment (POWERBAND_BLOCK_SIZE)")
    assert (settings.engine.seed, settings.origins["seed"]) == (1, f"file ({file})")
    assert (settings.engine.device, settings.origins["device"]) == ("auto", "default")
    assert settings.asked == {"max_num_seqs", "block_size", "seed"}


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("1", True), ("false", False), ("0", False), ("True", True), ("FALSE", False)]
)
def test_environment_understands_booleans(text: str, value: bool) -> None:
    assert resolved(environment={"POWERBAND_ENABLE_PREFIX_CACHING": text}).engine.enable_prefix_caching is value


def test_environment_understands_every_kind_of_value() -> None:
    environment = {
        "POWERBAND_THREADS": "2",
        "POWERBAND_GPU_MEMORY_UTILIZATION": "0.5",
        "POWERBAND_DTYPE": "float32",
        "POWERBAND_SERVED_MODEL_NAME": "7",
        "HOME": "/root",
    }
    engine = resolved(environment=environment).engine
    assert (engine.threads, engine.gpu_memory_utilization) == (2, 0.5)
    assert (engine.dtype, engine.served_model_name) == ("float32", "7")


def test_file_may_spell_names_with_hyphens_and_leave_values_empty(file: Path) -> None:
    file.write_text("max-num-seqs: 5\nkv_cache_memory:\n# a comment\nport: 9000\n")
    settings = resolved(file)
    assert settings.engine.max_num_seqs == 5
    assert settings.origins["kv_cache_memory"] == "default"
    assert "port" not in settings.origins, "known, but not this command's"


def test_empty_file_changes_nothing(file: Path) -> None:
    file.write_text("")
    assert resolved(file).asked == set()


def test_unknown_variable_names_the_nearest_known_one() -> None:
    with pytest.raises(UsageError, match="POWERBAND_MAX_NUM_SEQ ") as caught:
        resolved(environment={"POWERBAND_MAX_NUM_SEQ": "1"})
    assert caught.value.hint == "Did you mean POWERBAND_MAX_NUM_SEQS?"


@pytest.mark.parametrize("service", ["POWERBAND", "POWERBAND_GATEWAY", "POWERBAND_VLLM", "POWERBAND_2"])
@pytest.mark.parametrize(("address", "host"), [("10.43.1.39", "10.43.1.39"), ("fd00::1:39", "[fd00::1:39]")])
def test_variables_that_kubernetes_sets_for_a_service_are_no_settings(service: str, address: str, host: str) -> None:
    """As the kubelet's envvars.FromServices makes them, for a Service with a port of the name http."""
    links = {
        f"{service}_SERVICE_HOST": address,
        f"{service}_SERVICE_PORT": "8000",
        f"{service}_SERVICE_PORT_HTTP": "8000",
        f"{service}_PORT": f"tcp://{host}:8000",
        f"{service}_PORT_8000_TCP": f"tcp://{host}:8000",
        f"{service}_PORT_8000_TCP_PROTO": "tcp",
        f"{service}_PORT_8000_TCP_PORT": "8000",
        f"{service}_PORT_8000_TCP_ADDR": address,
    }
    assert resolved(environment=links).asked == set()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("POWERBAND_SERVICE_PROT", "8000"), ("POWERBAND_SERVICE_HOST", "me"), ("POWERBAND_PORT_X", "tcp://1.2.3.4:1")],
)
def test_variables_that_only_resemble_service_links_are_still_refused(variable: str, value: str) -> None:
    with pytest.raises(UsageError, match=variable):
        resolved(environment={variable: value})


def test_port_of_ours_is_still_a_setting() -> None:
    settings = resolve([ServerSettings], KNOWN, {}, {"POWERBAND_PORT": "9000"}, None)
    assert settings.values[ServerSettings].port == 9000


def test_unknown_key_names_the_nearest_known_one(file: Path) -> None:
    file.write_text("max_sequences: 1\nmax_num_seq: 1\n")
    with pytest.raises(UsageError, match=r"'max_sequences' in .* is not a setting") as caught:
        resolved(file)
    assert "max_num_seqs" in caught.value.hint


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"POWERBAND_MAX_NUM_SEQS": "many"}, "max_num_seqs is 'many'; it must be a whole number."),
        ({"POWERBAND_MAX_NUM_SEQS": "0"}, "max_num_seqs is 0; it must be at least 1."),
        ({"POWERBAND_THREADS": "4096"}, "threads is 4096; it must be between 1 and 1024."),
        ({"POWERBAND_GPU_MEMORY_UTILIZATION": "nan"}, "gpu_memory_utilization is nan; it must be between 0.01 and 1."),
        ({"POWERBAND_DTYPE": "int8"}, "dtype is 'int8'; it must be one of auto, float32, float16, bfloat16."),
        ({"POWERBAND_ENFORCE_EAGER": "maybe"}, "enforce_eager is 'maybe'; it must be true or false."),
        (
            {"POWERBAND_KV_CACHE_MEMORY": "4 parsecs"},
            "kv_cache_memory is '4 parsecs', which is not an amount of memory.",
        ),
    ],
)
def test_wrong_value_is_named_with_what_is_allowed_and_where_it_came_from(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        resolved(environment=environment)
    assert caught.value.message == message
    assert next(iter(environment)) in caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "holds a list, not names and values"),
        ("a: [1\n", "is not valid YAML"),
        ("max_num_seqs: {a: 1}\n", "it must be a whole number"),
        ("model: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
    ],
)
def test_wrong_file_is_a_usage_error(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    with pytest.raises(UsageError, match=message):
        resolved(file)


def test_missing_file_is_a_fault_of_the_environment(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="No such file"):
        resolved(tmp_path / "none.yaml")


OLD = ("longest_wait_s", "probe_every_s", "retry_share", "max_tries", "stall_timeout_s", "trace_share")
NEW = (
    *("max_queue_wait_s", "probe_interval_s", "retry_budget_ratio"),
    *("max_attempts", "stream_idle_timeout_s", "trace_sample_ratio"),
)


def gateway_settings(
    file: Path | None = None, environment: dict[str, str] | None = None, **given: Any
) -> GatewaySettings:
    found = resolve([GatewaySettings], (*KNOWN, GatewaySettings), given, environment or {}, file)
    settings: GatewaySettings = found.values[GatewaySettings]
    return settings


@pytest.mark.parametrize(("old", "new"), [*zip(OLD, NEW, strict=True)])
def test_old_names_work_in_every_layer_with_a_warning(
    old: str, new: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_renamed.cache_clear()
    flag, variable = f"--{old.replace('_', '-')}", f"POWERBAND_{old.upper()}"
    assert getattr(gateway_settings(**{old: 1}), new) == 1
    assert f"{flag} is now called --{new.replace('_', '-')}" in caplog.text
    assert getattr(gateway_settings(environment={variable: "1"}), new) == 1
    assert f"{variable} is now called POWERBAND_{new.upper()}" in caplog.text
    file.write_text(f"{old}: 1\n")
    assert getattr(gateway_settings(file), new) == 1
    assert f"{old} in {file} is now called {new} in {file}" in caplog.text


def test_the_new_name_wins_within_a_layer_and_the_higher_layer_wins_under_either_name(file: Path) -> None:
    file.write_text("max_attempts: 2\nmax_tries: 3\n")
    assert gateway_settings(file).max_attempts == 2
    assert gateway_settings(file, {"POWERBAND_MAX_TRIES": "4"}).max_attempts == 4
    assert gateway_settings(file, {"POWERBAND_MAX_TRIES": "4", "POWERBAND_MAX_ATTEMPTS": "5"}).max_attempts == 5
    assert gateway_settings(file, {"POWERBAND_MAX_ATTEMPTS": "5"}, max_tries=6).max_attempts == 6


def test_help_shows_new_names_only_and_a_flag_may_have_either(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gateway", "--help"]) == 0
    shown = capsys.readouterr().out
    for old, new in zip(OLD, NEW, strict=True):
        assert f"--{new.replace('_', '-')}" in shown
        assert f"--{old.replace('_', '-')}" not in shown
    assert main(["gateway", "--stall-timeout", "1"]) == 2
    assert "Did you mean --stream-idle-timeout-s?" in capsys.readouterr().err
    for flag in ("--max-attempts", "--max-tries"):
        assert main(["gateway", flag, "99"]) == 2
        assert "max_attempts is 99; it must be between 1 and 10." in capsys.readouterr().err


def test_a_wrong_value_under_an_old_name_is_reported_with_its_origin() -> None:
    with pytest.raises(UsageError, match="max_attempts is 99") as caught:
        gateway_settings(environment={"POWERBAND_MAX_TRIES": "99"})
    assert "POWERBAND_MAX_TRIES" in caught.value.hint
