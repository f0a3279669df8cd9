"""Tokenizer classes of transformers whose steps count instead of those in tokenizer.json.

In transformers 5 a class such as LlamaTokenizer takes vocabulary, merges and post-processor from tokenizer.json, and
builds the rest by rules of its own and by keys of tokenizer_config.json (`legacy`, `add_prefix_space`). Which class a
checkpoint gets, and what it builds, is as in `AutoTokenizer` (tokenization_auto.py and tokenization_<class>.py,
5.24), so that prompts have the same ids. Only where the class expects another kind of vocabulary than tokenizer.json
has (bytes, or SentencePiece's "▁") does tokenizer.json count here, since nothing could be encoded by that class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE

from powerband.text.added_tokens import ClassTokens, TokenFiles

# Classes by model_type, of those models that are served. Of qwen2 transformers says that published classes are wrong.
_BY_MODEL_TYPE = {
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "mistral": "TokenizersBackend",
    "mixtral": "TokenizersBackend",
    "phi3": "TokenizersBackend",
    "olmo2": "TokenizersBackend",
}
_DISTRUSTED = ("qwen2",)
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


@dataclass(frozen=True, slots=True)
class TokenizerClass:
    """What a class builds.

    `steps` sets normalizer, pre-tokenizer and decoder by tokenizer_config.json. `byte_level`: pieces spell bytes, as
    those of GPT-2, else they are SentencePiece's. `has_unk`: characters outside the vocabulary become unk_token, else
    nothing. `adds_bos`: whether BOS goes before a text; None: as tokenizer.json says.
    """

    steps: Callable[[RustTokenizer, Mapping[str, Any]], None]
    tokens: ClassTokens
    byte_level: bool = True
    has_unk: bool = False
    adds_bos: bool | None = None

    def build(self, rust: RustTokenizer, config: Mapping[str, Any], tokens: TokenFiles) -> RustTokenizer:
        """A tokenizer with the vocabulary and merges of `rust`, and with `tokens`."""
        model = rust.model
        model.fuse_unk = model.byte_fallback = not self.byte_level
        model.ignore_merges = False
        model.dropout = None
        model.unk_token = tokens.named.get("unk_token") if self.has_unk else None
        built = RustTokenizer(model)
        self.steps(built, config)
        built.add_tokens(tokens.added)
        if self.adds_bos is None:
            built.post_processor = rust.post_processor
        elif self.adds_bos and (bos := tokens.named.get("bos_token")):
            id = built.token_to_id(bos)
            built.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, id)])
        return built


def tokenizer_class(
    rust: RustTokenizer, config: Mapping[str, Any], model_config: Mapping[str, Any]
) -> TokenizerClass | None:
    """The class that a checkpoint's tokenizer has by tokenizer_config.json and config.json (which may be empty).

    None where tokenizer.json counts.
    """
    if not isinstance(rust.model, BPE):
        return None
    byte_level = any(b'"ByteLevel"' in part.__getstate__() for part in (rust.pre_tokenizer, rust.decoder) if part)
    found = _CLASSES.get(_class_name(config, model_config))
    return found if found and found.byte_level == byte_level else None


def _class_name(config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str:
    """The class's name without "Fast"."""
    named = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    name = named.removesuffix("Fast") if isinstance(named, str) else ""
    model_type = model_config.get("model_type")
    by_type = _BY_MODEL_TYPE.get(model_type, "") if isinstance(model_type, str) else ""
    is_backend = by_type == "TokenizersBackend"
    return by_type if not name or is_backend or model_type in _DISTRUSTED else name


def _llama(rust: RustTokenizer, config: Mapping[str, Any]) -> None:
    prefix = config.get("add_prefix_space") is not False
    scheme = "never" if not prefix else "always" if config.get("legacy") else "first"
    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    rust.decoder = decoders.Sequence([*_SPACES, decoders.Strip(" ", 1, 0)] if prefix else _SPACES)


def _code_llama(rust: RustTokenizer, config: Mapping[str, Any]) -> None:
    scheme = "never" if config.get("add_prefix_space") is False else "first"
    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    rust.decoder = decoders.Sequence([*_SPACES, decoders.Strip(" ", 1, 0)])


def _gemma(rust: RustTokenizer, _config: Mapping[str, Any]) -> None:
    rust.normalizer = normalizers.Replace(" ", "▁")
    rust.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    rust.decoder = decoders.Sequence(_SPACES)


def _gpt2(rust: RustTokenizer, config: Mapping[str, Any]) -> None:
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space") is True)
    rust.decoder = decoders.ByteLevel()


def _gpt_neox(rust: RustTokenizer, config: Mapping[str, Any]) -> None:
    _gpt2(rust, config)
    rust.normalizer = normalizers.NFC()


def _qwen2(rust: RustTokenizer, config: Mapping[str, Any]) -> None:
    prefix = config.get("add_prefix_space") is True
    words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")
    rust.normalizer = normalizers.NFC()
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
    )
    rust.decoder = decoders.ByteLevel()


def _cohere(rust: RustTokenizer, config: Mapping[str, Any]) -> None:
    _gpt_neox(rust, config)
    rust.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), rust.pre_tokenizer])


_LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_CODE_LLAMA = {
    **_LLAMA,
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}
_GEMMA = {
    "unk_token": "<unk>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_END = "<|endoftext|>"
_GPT2 = {"unk_token": _END, "bos_token": _END, "eos_token": _END}
_QWEN2 = {"unk_token": _END, "eos_token": _END, "pad_token": _END}
_COHERE = {
    "unk_token": "<UNK>",
    "bos_token": "<BOS_TOKEN>",
    "eos_token": "<|END_OF_TURN_TOKEN|>",
    "pad_token": "<PAD>",
    "cls_token": "<CLS>",
    "sep_token": "<SEP>",
    "mask_token": "<MASK_TOKEN>",
}
_CLASSES = {
    "LlamaTokenizer": TokenizerClass(_llama, ClassTokens(_LLAMA), byte_level=False),
    "CodeLlamaTokenizer": TokenizerClass(
        _code_llama, ClassTokens(_CODE_LLAMA), byte_level=False, has_unk=True, adds_bos=True
    ),
    "GemmaTokenizer": TokenizerClass(_gemma, ClassTokens(_GEMMA), byte_level=False, has_unk=True),
    "GPT2Tokenizer": TokenizerClass(_gpt2, ClassTokens(_GPT2)),
    "GPTNeoXTokenizer": TokenizerClass(_gpt_neox, ClassTokens({**_GPT2, "pad_token": "<|padding|>"}), adds_bos=False),
    "Qwen2Tokenizer": TokenizerClass(_qwen2, ClassTokens(_QWEN2, added_again=True)),
    "CohereTokenizer": TokenizerClass(_cohere, ClassTokens(_COHERE, added_again=True)),
}
