"""Where a setting comes from: command line, then environment, then file, then default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from powerband.cli.settings import Resolved, resolve
from powerband.errors import EnvironmentFault, UsageError
from powerband.server.settings import ServerSettings
from powerband.spec.settings import EngineSettings

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
