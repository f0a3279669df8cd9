"""Pooled prompts: the vectors of sentence-transformers, however the scheduler cuts, mixes and interrupts them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_models as models
from engines_for_tests import TestEngine
from safetensors.torch import load_file, save_file
from sentence_models import HIDDEN, TEXTS, Floats, dense, normalize

from powerband.core.loop import Add
from powerband.core.params import PoolingParams, SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.step import TokenOutput
from powerband.engine.model_loader import checkpoint
from powerband.errors import UsageError
from powerband.spec.checkpoint.quantization import PLAIN
from powerband.spec.model.checkpoint_precision import read_for_planning
from powerband.spec.model.counts import parameter_bytes
from powerband.spec.model.reader import read_model_spec
from powerband.spec.settings import EngineSettings
from powerband.text.tokenizer import Tokenizer

CLOSE = 2e-5

# name: (pooling, what follows it)
CHECKPOINTS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "last": ("lasttoken", (normalize,)),
    "mean": ("mean", ()),
    "cls": ("cls", (dense(24), normalize)),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sentences")
    base = models.random_decoder(root / "base")
    return {
        name: models.sentence_model(base, root / name, pooling, *modules)
        for name, (pooling, modules) in CHECKPOINTS.items()
    }


def embed(engine: TestEngine, folder: Path, texts: Sequence[str], **params: Any) -> list[TokenOutput]:
    """All texts at once; the last output of each."""
    ids = [add(engine, folder, text, **params) for text in texts]
    outputs = engine.run()
    return [outputs[id][-1] for id in ids]


def add(engine: TestEngine, folder: Path, text: str, **params: Any) -> str:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    id = f"pooled {len(engine.inbox.commands)}"
    request = EngineRequest(
        id=id,
        token_ids=tokenizer.encode(text),
        params=SamplingParams(max_tokens=1),
        arrival_s=0.0,
        pooling=PoolingParams(**params),
    )
    engine.inbox.commands.append(Add(request))
    return id


def vectors(outputs: Sequence[TokenOutput]) -> Floats:
    for output in outputs:
        assert output.error is None, output.error
        assert output.vector is not None
    return np.stack([np.frombuffer(output.vector or b"", np.float32) for output in outputs])


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 16, "max_num_seqs": 3}, {"async_scheduling": True}],
    ids=["at once", "in chunks", "overlapping"],
)
def test_vectors_are_those_of_sentence_transformers(
    checkpoints: dict[str, Path], name: str, settings: dict[str, Any]
) -> None:
    folder = checkpoints[name]
    expected = models.expected(folder, TEXTS)
    with TestEngine(folder, **settings) as engine:
        for _ in range(2):  # the second time, prefixes are in the cache
            np.testing.assert_allclose(vectors(embed(engine, folder, TEXTS)), expected, atol=CLOSE)


def test_the_prefix_cache_serves_only_what_needs_the_last_token(checkpoints: dict[str, Path]) -> None:
    for name, finds in (("last", True), ("mean", False), ("cls", False)):
        with TestEngine(checkpoints[name]) as engine:
            embed(engine, checkpoints[name], TEXTS)
            again = embed(engine, checkpoints[name], TEXTS)
            assert any(output.num_cached_tokens for output in again) == finds


def test_a_preempted_prompt_gives_the_same_vector(checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["mean"]
    expected = models.expected(folder, TEXTS)
    with TestEngine(folder, max_num_batched_tokens=16, max_num_seqs=4) as engine:
        ids = [add(engine, folder, text) for text in TEXTS]
        outputs: dict[str, TokenOutput] = {}
        for step in range(200):
            for output in engine.engine.core.step():
                outputs[output.id] = output
            if step == 4:
                scheduler = engine.engine.scheduler
                scheduler._preempt(scheduler.running[-1])
            if len(outputs) == len(ids):
                break
        assert max(output.num_preemptions for output in outputs.values()) == 1
        np.testing.assert_allclose(vectors([outputs[id] for id in ids]), expected, atol=CLOSE)


def test_a_vector_that_is_not_finite_fails_its_request_alone(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["last"], tmp_path / "damaged")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    tensors = load_file(folder / "model.safetensors")
    [embedding] = [tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")]
    embedding[tokenizer.encode("x")] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with TestEngine(folder) as engine:
        damaged, good = embed(engine, folder, ["x", "A list"])
    assert damaged.error is not None
    assert (damaged.error.code, damaged.vector) == ("not_finite", None)
    np.testing.assert_allclose(vectors([good]), models.expected(checkpoints["last"], ["A list"]), atol=CLOSE)


def test_dimensions_are_cut_before_the_length_becomes_one(checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["last"]
    with TestEngine(folder) as engine:
        cut = vectors(embed(engine, folder, TEXTS, dimensions=16))
        raw = vectors(embed(engine, folder, TEXTS, use_activation=False))
    np.testing.assert_allclose(
        cut, models.expected(folder, TEXTS, truncate_dim=16, normalize_embeddings=True), atol=CLOSE
    )
    assert np.linalg.norm(raw, axis=1).min() > 1.5


def test_a_prompt_may_fill_the_whole_context(checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["last"]
    with TestEngine(folder, max_model_len=8, block_size=8, kv_cache_memory="1MiB") as engine:
        for length, fits in ((8, True), (9, False)):
            request = EngineRequest(
                id="r",
                token_ids=list(range(length)),
                params=SamplingParams(max_tokens=1),
                arrival_s=0.0,
                pooling=PoolingParams(),
            )
            engine.inbox.commands.append(Add(request))
            [output] = engine.run()["r"]
            assert (output.vector is not None) == fits
            assert fits or (output.error is not None and output.error.code == "context_length_exceeded")


def test_an_embedding_model_does_not_generate(checkpoints: dict[str, Path]) -> None:
    with TestEngine(checkpoints["last"]) as engine:
        id = engine.add([1, 2, 3])
        error = engine.run()[id][-1].error
    assert error is not None
    assert error.code == "model_does_not_generate"


def test_a_model_that_generates_does_not_embed(tmp_path: Path) -> None:
    folder = models.random_decoder(tmp_path)
    with TestEngine(folder) as engine:
        [output] = embed(engine, folder, ["x"])
    assert output.error is not None
    assert output.error.code == "model_does_not_embed"


def test_a_checkpoint_without_a_head_of_its_own_embeds(tmp_path: Path) -> None:
    base = models.random_decoder(tmp_path / "base", "llama2", tie_word_embeddings=False)
    folder = models.sentence_model(base, tmp_path / "embeds", "lasttoken", normalize)
    with TestEngine(folder) as engine:
        np.testing.assert_allclose(vectors(embed(engine, folder, TEXTS)), models.expected(folder, TEXTS), atol=CLOSE)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "pooling by 'max' is not supported"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "pooling by ['cls', 'mean'] is not supported"),
        ("2_Dense/config.json", {"activation_function": "my.Code"}, "activation 'my.Code' is not supported"),
        ("2_Dense/config.json", {"in_features": 3}, "takes 3 numbers and is given 64"),
        ("2_Dense/config.json", {"use_residual": True}, "residual is not supported"),
        ("sentence_bert_config.json", {"modality_config": {"text": {}, "message": {}}}, "chat template"),
        ("config_sentence_transformers.json", {"default_prompt_name": "none"}, "default prompt 'none'"),
    ],
)
def test_what_a_checkpoint_asks_for_and_cannot_get_is_named(
    checkpoints: dict[str, Path], tmp_path: Path, file: str, change: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(checkpoints["cls"], folder)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError) as caught:
        read_model_spec(folder)
    assert said in caught.value.message


def test_older_configurations_of_pooling_are_read(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(checkpoints["mean"], folder)
    old = {"word_embedding_dimension": 64, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 100, "do_lower_case": False}))
    spec = read_model_spec(folder)
    assert spec.pooling is not None
    assert (spec.pooling.mode, spec.max_position) == ("cls", 100)


def test_a_language_model_embeds_beside_what_it_generates(tmp_path: Path) -> None:
    folder = models.random_decoder(tmp_path / "base")
    same = models.sentence_model(folder, tmp_path / "same", "lasttoken", normalize)
    with TestEngine(folder) as engine:
        alone = engine.generate([[5, 6, 7], [8] * 40])
    with TestEngine(folder, convert="embed", max_num_batched_tokens=16, max_num_seqs=8) as engine:
        ids = [engine.add(prompt) for prompt in ([5, 6, 7], [8] * 40)]
        pooled = [add(engine, folder, text) for text in TEXTS]
        outputs = engine.run()
    assert [[token for output in outputs[id] for token in output.token_ids] for id in ids] == alone
    found = vectors([outputs[id][-1] for id in pooled])
    np.testing.assert_allclose(found, models.expected(same, TEXTS), atol=CLOSE)


def test_a_model_that_was_saved_without_its_head_embeds_by_its_last_token(tmp_path: Path) -> None:
    import transformers

    folder = models.random_decoder(tmp_path / "base", "llama2", tie_word_embeddings=False)
    same = models.sentence_model(folder, tmp_path / "same", "lasttoken", normalize)
    transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)
    with TestEngine(folder) as engine:
        np.testing.assert_allclose(vectors(embed(engine, folder, TEXTS)), models.expected(same, TEXTS), atol=CLOSE)


def test_plans_are_not_made_for_embedding_models(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="plans are made for models that generate"):
        read_for_planning(checkpoints["mean"] / "config.json")


def test_projections_count_in_the_memory_plan(checkpoints: dict[str, Path]) -> None:
    spec = read_model_spec(checkpoints["cls"])
    without = replace(spec, pooling=None)
    counted = parameter_bytes(spec, "float32", PLAIN) - parameter_bytes(without, "float32", PLAIN)
    assert counted == 4 * (HIDDEN * 24 + 24)


def test_of_a_checkpoint_on_the_hub_its_modules_are_fetched(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    fetched = tmp_path / "fetched"

    def download(
        _name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None = None
    ) -> str:
        for path in sorted(checkpoints["cls"].rglob("*")):
            name = str(path.relative_to(checkpoints["cls"]))
            is_ignored = any(fnmatch(name, pattern) for pattern in ignore_patterns or ())
            if path.is_file() and not is_ignored and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (fetched / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, fetched / name)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(checkpoint, "_weights", lambda _name, _revision: ["model.safetensors"])
    folder = checkpoint.resolve_model(EngineSettings(model="owner/sentences"))
    with TestEngine(folder) as engine:
        expected = models.expected(checkpoints["cls"], TEXTS)
        np.testing.assert_allclose(vectors(embed(engine, folder, TEXTS)), expected, atol=CLOSE)
