"""Tiny random checkpoints written by sentence-transformers, and what it makes of texts: the oracle of pooling."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from models_for_tests import random_model

import powerband

DEMO = Path(powerband.__file__).parent / "demo"
VOCABULARY = 4096  # of the demo's tokenizer
HIDDEN = 64
TEXTS = [
    "Hello, world",
    "To open a file, use the built-in function open. " * 9,
    "x",
    "A list is mutable; a tuple is not.",
]

Floats = npt.NDArray[np.float32]


def random_decoder(folder: Path, family: str = "qwen3", **changes: Any) -> Path:
    """A random decoder with the demo's tokenizer, but without a chat template, which texts would be put into."""
    model = random_model(family, vocab_size=VOCABULARY, **changes)
    model.save_pretrained(folder)
    shutil.copy(DEMO / "tokenizer.json", folder)
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 512}))
    return folder


_WORDS = ["the", "a", "to", "open", "file", "list", "is", "mutable", "tuple", "not", "hello", "world", "of", "tokens"]
_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(33, 127))]
WORD_PIECES = list(dict.fromkeys([*_PIECES, *(f"##{chr(c)}" for c in range(97, 123)), *_WORDS]))


def random_encoder(folder: Path, family: str = "bert", *, head: str = "Model", **changes: Any) -> Path:
    """A random BERT or RoBERTa, every parameter of which is random, with BERT's tokenizer."""
    import transformers

    name = {"bert": "Bert", "roberta": "Roberta"}[family]
    tokenizer = transformers.BertTokenizer(vocab={word: id for id, word in enumerate(WORD_PIECES)})
    tokenizer.model_max_length = 96
    tokenizer.save_pretrained(folder)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(WORD_PIECES),
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=128,
        initializer_range=0.3,
        **{"pad_token_id": 0, **changes},
    )
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}{head}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    return folder


def random_classifier(folder: Path) -> Path:
    """A decoder that scores a pair of texts by its last token."""
    import transformers

    random_decoder(folder)
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=1, pad_token_id=0)
    torch.manual_seed(4)
    model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return folder


def rewritten(source: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    """A copy whose tensors have other names."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    tensors = {rename(name): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sentence_model(base: Path, folder: Path, pooling: str, *modules: Any, **settings: Any) -> Path:
    """`base` with a pooling and further modules, as sentence-transformers saves it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(5)
    every = [Transformer(str(base)), Pooling(HIDDEN, pooling), *(make() for make in modules)]
    SentenceTransformer(modules=every, device="cpu", **settings).save_pretrained(str(folder), create_model_card=False)
    return folder


def dense(out_features: int, **settings: Any) -> Any:
    """Makes a Dense module. Only that imports what it needs: parameters of tests name it in every process."""

    def make() -> Any:
        from sentence_transformers.base.modules import Dense

        return Dense(HIDDEN, out_features, **settings)

    return make


def normalize() -> Any:
    from sentence_transformers.base.modules import Normalize

    return Normalize()


def expected(folder: Path, texts: list[str], **settings: Any) -> Floats:
    """What sentence-transformers gives in float32: [texts, dimensions]."""
    return np.asarray(_loaded(folder).encode(texts, show_progress_bar=False, **settings))


@cache
def _loaded(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
