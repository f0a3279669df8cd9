"""A checkpoint with random weights and a tokenizer as large as its vocabulary: the same weights for every engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase

import torch
from benchmarks.cpu.shapes import Shape
from safetensors.torch import save_file

SEED = 0
SHARD_BYTES = 2 * 10**9
_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """Write config, weights (bfloat16, normal with the config's deviation; norms 1) and tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}))
    write_tokenizer(shape.config["vocab_size"], folder)
    generator = torch.Generator().manual_seed(SEED)
    shard: dict[str, torch.Tensor] = {}
    where: dict[str, str] = {}
    size = count = 0
    for name, dims in tensors(shape):
        if len(dims) == 1:
            tensor = torch.ones(dims, dtype=torch.bfloat16)
        else:
            deviation = shape.config["initializer_range"]
            tensor = torch.empty(dims, dtype=torch.bfloat16).normal_(0.0, deviation, generator=generator)
        shard[name] = tensor
        where[name] = f"model-{count:05d}.safetensors"
        size += tensor.nbytes
        if size - SHARD_BYTES * count > SHARD_BYTES:
            save_file(shard, folder / where[name], metadata={"format": "pt"})
            shard, count = {}, count + 1
    if shard:
        save_file(shard, folder / f"model-{count:05d}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and dimensions, as Hugging Face's checkpoints have them."""
    c = shape.config
    hidden, middle, head_dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for index in range(c["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (q, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, q)
        if c["model_type"] == "qwen3":
            yield f"{layer}.self_attn.q_norm.weight", (head_dim,)
            yield f"{layer}.self_attn.k_norm.weight", (head_dim,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (middle, hidden)
        yield f"{layer}.mlp.up_proj.weight", (middle, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, middle)
    yield "model.norm.weight", (hidden,)


def write_tokenizer(vocab_size: int, folder: Path) -> None:
    """A byte-level BPE with pairs of letters; the rest of the vocabulary is filled with words that nothing says."""
    vocab = {"<|end|>": 0}
    for character in _byte_characters():
        vocab[character] = len(vocab)
    pairs = [(first, second) for first in ascii_lowercase for second in ascii_lowercase]
    for first, second in pairs:
        vocab[first + second] = len(vocab)
    while len(vocab) < vocab_size:
        vocab[f"word{len(vocab)}"] = len(vocab)
    end = {"id": 0, "content": "<|end|>", "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | {"normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZER,
        "post_processor": None,
        "decoder": _PRE_TOKENIZER,
        "model": {"type": "BPE", "vocab": vocab, "merges": [f"{a} {b}" for a, b in pairs]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|end|>",
        "eos_token": "<|end|>",
        "model_max_length": 32_768,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    extra = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(extra)) for byte in range(256)]
