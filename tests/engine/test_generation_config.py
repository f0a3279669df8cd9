"""Defaults of sampling and ends of answers, as the files of a checkpoint say them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import powerband
from powerband import LLM, SamplingParams
from powerband.engine.model_loader.generation_config import end_token_ids, sampling_defaults
from powerband.errors import EnvironmentFault, UsageError
from powerband.spec.model.reader import read_model_spec
from powerband.spec.settings import EngineSettings

DEMO = Path(powerband.__file__).parent / "demo"
SMALL: dict[str, Any] = {"dtype": "float32", "threads": 1, "kv_cache_memory": "16MiB", "max_num_seqs": 2}
AUTO = EngineSettings()


def checkpoint(folder: Path, generation: dict[str, Any] | None = None, **config: Any) -> Path:
    """The demo model with another generation_config.json, and changed keys of config.json (... removes one)."""
    shutil.copytree(DEMO, folder, dirs_exist_ok=True)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    values = json.loads((folder / "config.json").read_text()) | config
    kept = {name: value for name, value in values.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def test_every_field_has_the_name_of_sampling_params(tmp_path: Path) -> None:
    given = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.05}
    folder = checkpoint(tmp_path, {**given, "max_new_tokens": 99, "do_sample": True, "num_beams": 1})
    assert sampling_defaults(AUTO, folder) == {**given, "max_tokens": 99}


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": None, "temperature": None, "top_k": 50.0}, {"top_k": 50}),
        ({"eos_token_id": 2}, {}),
    ],
)
def test_what_is_not_said_has_no_default(tmp_path: Path, generation: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sampling_defaults(AUTO, checkpoint(tmp_path, generation)) == expected


def test_an_old_checkpoint_has_them_in_its_config(tmp_path: Path) -> None:
    assert sampling_defaults(AUTO, checkpoint(tmp_path, None, temperature=0.3)) == {"temperature": 0.3}


def test_they_can_be_ignored_or_taken_from_another_folder(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", {"temperature": 0.6})
    other = checkpoint(tmp_path / "other", {"top_k": 5, "eos_token_id": 7})
    assert sampling_defaults(EngineSettings(generation_config="off"), folder) == {}
    assert sampling_defaults(EngineSettings(generation_config="vllm"), folder) == {}
    elsewhere = EngineSettings(generation_config=str(other))
    assert sampling_defaults(elsewhere, folder) == {"top_k": 5}
    assert end_token_ids(elsewhere, folder, (2,), 4096) == [2, 7]
    with pytest.raises(EnvironmentFault, match=r"there is no file nowhere/generation_config\.json"):
        sampling_defaults(EngineSettings(generation_config="nowhere"), folder)


@pytest.mark.parametrize("wrong", [{"temperature": "warm"}, {"top_p": 2}, {"max_new_tokens": 0}, {"top_k": True}])
def test_a_wrong_value_is_refused_by_file_and_name(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"generation_config\.json: .*--generation-config off"):
        sampling_defaults(AUTO, checkpoint(tmp_path, wrong))


@pytest.mark.parametrize(
    ("eos", "generation", "expected"),
    [
        (0, {"eos_token_id": [2, 5]}, (0, 2, 5)),
        (2, None, (2,)),
        (None, {"eos_token_id": 5}, (5,)),
        (None, None, ()),
        (..., {"eos_token_id": 5}, (5,)),
    ],
)
def test_ends_of_config_and_generation_config_count_together(
    tmp_path: Path, eos: Any, generation: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    assert read_model_spec(checkpoint(tmp_path, generation, eos_token_id=eos)).eos_token_ids == expected


def test_the_end_of_a_family_is_no_end_where_the_checkpoint_names_its_own(tmp_path: Path) -> None:
    """Llama's default is token 2, which is a word in the vocabulary of Llama 3."""
    config = json.loads((DEMO / "config.json").read_text()) | {"model_type": "llama"}
    del config["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_spec(tmp_path).eos_token_ids == (2,)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>"}')
    assert read_model_spec(tmp_path).eos_token_ids == ()


def test_the_tokenizers_end_ends_an_answer(tmp_path: Path) -> None:
    with LLM(str(checkpoint(tmp_path, None, eos_token_id=0)), **SMALL) as llm:
        assert llm.info.eos_token_ids == [0, 2]
        [result] = llm.chat(
            [{"role": "user", "content": "What is 2 + 3?"}],
            SamplingParams(temperature=0, max_tokens=60),
            use_tqdm=False,
        )
    assert result.outputs[0].finish_reason == "stop"


def test_without_parameters_a_model_answers_as_transformers_does(tmp_path: Path) -> None:
    generation = {"do_sample": False, "repetition_penalty": 1.8, "max_new_tokens": 24, "eos_token_id": [2, 0]}
    folder = checkpoint(tmp_path, generation, dtype="float32")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The module is", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**ids)[0, ids["input_ids"].shape[1] :])
    with LLM(str(folder), **SMALL) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(
            temperature=0.0, repetition_penalty=1.8, max_tokens=24
        )
        assert llm.generate("The module is", use_tqdm=False)[0].outputs[0].text == expected
        explicit = SamplingParams(temperature=0, max_tokens=24)
        assert llm.generate("The module is", explicit, use_tqdm=False)[0].outputs[0].text != expected


def test_settings_that_change_outputs_and_are_not_applied_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain: dict[str, Any] = {
        "num_beams": 1,
        "typical_p": 1.0,
        "bad_words_ids": None,
        "no_repeat_ngram_size": 0,
        "max_length": 4096,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(plain))
    sampling_defaults(EngineSettings(model=str(tmp_path)), tmp_path)
    assert not caplog.records
    for changed in ({"stop_strings": ["END"]}, {"top_h": 0.4}, {"num_beams": 4, "suppress_tokens": [3]}):
        caplog.clear()
        (tmp_path / "generation_config.json").write_text(json.dumps(changed))
        sampling_defaults(EngineSettings(model=str(tmp_path)), tmp_path)
        assert "generation_config.json: not applied" in caplog.text
    assert "suppress_tokens=[3], num_beams=4" in caplog.text
