"""What of `make bench-cpu` needs no peer: the shapes, the rows on an engine of ours, the comparison, the guard."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from benchmarks.cpu import engines, quiet, report, rows, shapes
from benchmarks.cpu.checkpoint import write_checkpoint
from benchmarks.cpu.worker import Bench
from safetensors import safe_open
from tokenizers import Tokenizer

from powerband.spec.model.reader import read_model_spec


def test_shapes_have_the_sizes_that_their_names_say():
    assert shapes.QWEN3_06B.weight_bytes("bf16") == pytest.approx(1.19e9, rel=0.01)
    assert shapes.QWEN3_06B.kv_bytes_per_token("bf16") == 114_688
    assert shapes.LLAMA_32_3B.weight_bytes("bf16") == pytest.approx(6.4e9, rel=0.01)
    assert shapes.QWEN3_06B.weight_bytes("int4") < shapes.QWEN3_06B.weight_bytes("int8") / 1.5
    assert shapes.QWEN3_06B.prefill_flops(1024) / 1024 > 0.88e9


def test_checkpoint_is_one_that_we_read(tmp_path: Path):
    write_checkpoint(shapes.TINY, tmp_path)
    spec = read_model_spec(tmp_path)
    assert (spec.hidden_size, spec.num_layers, spec.tie_embeddings) == (256, 2, True)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(tmp_path / index["model.norm.weight"], "pt") as file:
        assert file.get_tensor("model.norm.weight").shape == (256,)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == shapes.TINY.config["vocab_size"]
    assert tokenizer.decode(tokenizer.encode("over the hill").ids) == "over the hill"


class Imagined:
    """An engine that computes whole prompts in one step and then gives each request a token a step."""

    versions: ClassVar[dict[str, str]] = {}

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.batches: list[int] = []

    @property
    def busy(self) -> bool:
        return bool(self.left)

    def add(self, id: int, prompt: list[int], max_tokens: int, sampling: dict[str, Any]) -> None:
        assert all(0 < token < 100 for token in prompt)
        self.left[id] = max_tokens

    def step(self) -> dict[int, int]:
        self.batches.append(len(self.left))
        tokens = dict.fromkeys(self.left, 1)
        self.left = {id: count - 1 for id, count in self.left.items() if count > 1}
        return tokens

    def cancel(self, ids: Iterable[int]) -> None:
        for id in ids:
            self.left.pop(id, None)


def test_rows_measure_what_they_say():
    engine = Imagined()
    bench = Bench(engine, {"vocab": 100, "seed": 0})
    measured = bench.one_stream() | bench.prefill() | bench.at_once() | bench.decode(512, [32, 16, 8, 1])
    measured |= bench.decode(2048, [8, 1]) | bench.sampling()
    wanted = {metric.key for metric in rows.metrics("abcde")}
    assert wanted - set(measured) == {rows.step_key(batch, 2048) for batch in (16, 32)}
    assert not engine.busy
    assert engine.batches.count(16) == 10  # row d: two to warm up, eight measured


def figures(**values: float) -> report.Figures:
    made = report.Figures()
    for name, value in values.items():
        name = name.replace("_", "-", 1)
        made.add(name, {"metrics": {"a tpot": value}, "others": {"a": 0.0}, "versions": {}})
    return made


def test_comparison_is_with_the_best_peer_of_the_same_precision():
    chosen = engines.variants(engines.DEFAULT_ENGINES, ["bf16", "int8"])
    some = figures(powerband_bf16=20.0, openvino_bf16=30.0, vllm_bf16=40.0, powerband_int8=10.0, openvino_int8=12.0)
    plain, small = report.lines(some, chosen, "a", lambda _metric, _precision: 5.0)
    assert (plain.peer, plain.times_peer, plain.of_limit) == ("openvino-bf16", 1.5, 0.25)
    assert (small.peer, small.times_peer, small.times_bf16_peer) == ("openvino-int8", 1.2, 3.0)
    assert "openvino-int8" in report.table([plain, small])


def test_only_slow_peers_are_left_out():
    chosen = engines.variants(engines.DEFAULT_ENGINES, ["bf16"])
    some = figures(powerband_bf16=90.0, openvino_bf16=30.0, vllm_bf16=40.0, llama_bf16=50.0)
    assert some.slow_rows(chosen, 1.5) == {"llama-bf16": {"a"}}


def test_a_cost_within_the_noise_has_no_ratio():
    metric = rows.metrics("e")[0]
    assert report.ratio(metric, -0.1, 3.0) is None
    assert report.ratio(metric, 1.0, 3.0) == 3.0
    assert report.ratio(replace(metric, more_is_better=True), 6.0, 3.0) == 2.0


def test_guard_repeats_a_row_that_was_disturbed_and_keeps_the_quietest(monkeypatch: pytest.MonkeyPatch):
    shares = iter([0.5, 0.2, 0.3])
    monkeypatch.setattr(quiet.Guard, "_wait", lambda _self: None)
    monkeypatch.setattr(quiet.Guard, "_share", lambda _self, function: (next(shares), function()))
    values = iter([1.0, 2.0, 3.0])
    guard = quiet.Guard()
    assert guard("a", lambda: {"a tpot": next(values)}) == {"a tpot": 2.0}
    assert guard.others == {"a": 0.2}
