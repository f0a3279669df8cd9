"""Tokenizer classes of transformers whose steps count instead of those in tokenizer.json.

In transformers 5 a class such as LlamaTokenizer takes vocabulary, merges and post-processor from tokenizer.json, and
builds the rest by rules of its own and by keys of tokenizer_config.json (`legacy`, `add_prefix_space`,
`do_lower_case`). Which class a checkpoint gets, and what it builds, is as in `AutoTokenizer` (tokenization_auto.py and
tokenization_<class>.py, 5.24), so that prompts have the same ids. Only where the class expects another kind of
vocabulary than tokenizer.json has (bytes, SentencePiece's "▁", WordPiece, Unigram) does tokenizer.json count here,
since nothing could be encoded by that class.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE, Unigram, WordPiece

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
    "bert": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}
_DISTRUSTED = ("qwen2",)
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UNIGRAM_UNK_ID = 3
_SPACES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


Vocabulary = Literal["bytes", "pieces", "words", "unigram"]
Frame = Callable[[RustTokenizer, Mapping[str, str], Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class TokenizerClass:
    """What a class builds.

    `steps` sets normalizer, pre-tokenizer and decoder by tokenizer_config.json. `vocabulary`: BPE whose pieces spell
    bytes (as those of GPT-2) or are SentencePiece's, WordPiece's words, or Unigram. `has_unk`: characters outside the
    vocabulary become unk_token, else nothing. `frame`: the post-processor, from the named tokens and
    tokenizer_config.json; None: that of tokenizer.json.
    """

    steps: Callable[[RustTokenizer, Mapping[str, Any]], None]
    tokens: ClassTokens
    vocabulary: Vocabulary = "bytes"
    has_unk: bool = False
    frame: Frame | None = None

    def build(self, rust: RustTokenizer, config: Mapping[str, Any], tokens: TokenFiles) -> RustTokenizer:
        """A tokenizer with the vocabulary and merges of `rust`, and with `tokens`."""
        built = RustTokenizer(self._model(rust, tokens.named.get("unk_token")))
        if self.vocabulary == "unigram":
            built.normalizer = _charsmap(rust)
        self.steps(built, config)
        built.add_tokens(tokens.added)
        frame = (self.frame and self.frame(built, tokens.named, config)) or rust.post_processor
        if frame is not None:
            built.post_processor = frame
        return built

    def _model(self, rust: RustTokenizer, unk_token: str | None) -> Any:
        model = rust.model
        if isinstance(model, WordPiece):
            return WordPiece(rust.get_vocab(with_added_tokens=False), unk_token=unk_token or "[UNK]")
        if isinstance(model, Unigram):
            vocabulary = json.loads(model.__getstate__())["vocab"]
            return Unigram([tuple(piece) for piece in vocabulary], unk_id=_UNIGRAM_UNK_ID, byte_fallback=False)
        if isinstance(model, BPE):
            model.fuse_unk = model.byte_fallback = self.vocabulary != "bytes"
            model.ignore_merges = False
            model.dropout = None
            model.unk_token = unk_token if self.has_unk else None
        return model


def tokenizer_class(
    rust: RustTokenizer, config: Mapping[str, Any], model_config: Mapping[str, Any]
) -> TokenizerClass | None:
    """The class that a checkpoint's tokenizer has by tokenizer_config.json and config.json (which may be empty).

    None where tokenizer.json counts.
    """
    found = _CLASSES.get(_class_name(config, model_config))
    return found if found and found.vocabulary == _vocabulary(rust) else None


def _vocabulary(rust: RustTokenizer) -> Vocabulary | None:
    if isinstance(rust.model, BPE):
        steps = (rust.pre_tokenizer, rust.decoder)
        return "bytes" if any(b'"ByteLevel"' in step.__getstate__() for step in steps if step) else "pieces"
    if isinstance(rust.model, WordPiece):
        return "words"
    return "unigram" if isinstance(rust.model, Unigram) else None


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


def _bert(rust: RustTokenizer, config: Mapping[str, Any]) -> None:
    strip_accents = config.get("strip_accents")
    rust.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars") is not False,
        strip_accents=strip_accents if isinstance(strip_accents, bool) else None,
        lowercase=config.get("do_lower_case") is not False,
    )
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece(prefix="##")


def _xlm_roberta(rust: RustTokenizer, config: Mapping[str, Any]) -> None:
    scheme = "never" if config.get("add_prefix_space") is False else "always"
    metaspace = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    rust.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    rust.decoder = decoders.Metaspace(prepend_scheme=scheme)


def _charsmap(rust: RustTokenizer) -> Any:
    """The normalizer of a SentencePiece model, without the steps around it; None if there is none."""
    state = json.loads(rust.normalizer.__getstate__()) if rust.normalizer else {}
    for step in state["normalizers"] if state.get("type") == "Sequence" else [state]:
        if step.get("type") == "Precompiled":
            charsmap = step["precompiled_charsmap"]
            return normalizers.Precompiled(base64.b64decode(charsmap) if isinstance(charsmap, str) else bytes(charsmap))
    return None


def _plain(_rust: RustTokenizer, _named: Mapping[str, str], _config: Mapping[str, Any]) -> Any:
    return processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])


def _begins_with_bos(rust: RustTokenizer, named: Mapping[str, str], config: Mapping[str, Any]) -> Any:
    bos = named.get("bos_token")
    if bos is None:
        return _plain(rust, named, config)
    return processors.TemplateProcessing(
        single=[bos, "$A:0"],
        pair=[bos, "$A:0", f"{bos}:1", "$B:1"],
        special_tokens=[(bos, rust.token_to_id(bos))],
    )


def _pair_of(rust: RustTokenizer, named: Mapping[str, str], first: str, last: str) -> list[tuple[str, int]] | None:
    """The tokens around a text; None where one does not exist."""
    texts = [named.get(name) for name in (first, last)]
    found = [(text, id) for text in texts if text is not None and (id := rust.token_to_id(text)) is not None]
    return found if len(found) == len(texts) else None


def _cls_and_sep(rust: RustTokenizer, named: Mapping[str, str], _config: Mapping[str, Any]) -> Any:
    tokens = _pair_of(rust, named, "cls_token", "sep_token")
    if tokens is None:
        return None
    (cls, _), (sep, _) = tokens
    return processors.TemplateProcessing(
        single=[cls, "$A:0", sep], pair=[cls, "$A:0", sep, "$B:1", f"{sep}:1"], special_tokens=tokens
    )


def _roberta_frame(rust: RustTokenizer, named: Mapping[str, str], config: Mapping[str, Any]) -> Any:
    tokens = _pair_of(rust, named, "cls_token", "sep_token")
    if tokens is None:
        return None
    cls, sep = tokens
    return processors.RobertaProcessing(sep, cls, True, config.get("add_prefix_space") is True)


def _bos_and_eos(rust: RustTokenizer, named: Mapping[str, str], _config: Mapping[str, Any]) -> Any:
    tokens = _pair_of(rust, named, "bos_token", "eos_token")
    if tokens is None:
        return None
    (bos, _), (eos, _) = tokens
    return processors.TemplateProcessing(
        single=[bos, "$A", eos], pair=[bos, "$A", eos, eos, "$B", eos], special_tokens=tokens
    )


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
_BERT = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_ROBERTA = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_BERT_CLASS = TokenizerClass(_bert, ClassTokens(_BERT), "words", frame=_cls_and_sep)
_ROBERTA_CLASS = TokenizerClass(_gpt2, ClassTokens(_ROBERTA), frame=_roberta_frame)
_CLASSES = {
    "LlamaTokenizer": TokenizerClass(_llama, ClassTokens(_LLAMA), "pieces"),
    "CodeLlamaTokenizer": TokenizerClass(
        _code_llama, ClassTokens(_CODE_LLAMA), "pieces", has_unk=True, frame=_begins_with_bos
    ),
    "GemmaTokenizer": TokenizerClass(_gemma, ClassTokens(_GEMMA), "pieces", has_unk=True),
    "GPT2Tokenizer": TokenizerClass(_gpt2, ClassTokens(_GPT2)),
    "GPTNeoXTokenizer": TokenizerClass(_gpt_neox, ClassTokens({**_GPT2, "pad_token": "<|padding|>"}), frame=_plain),
    "Qwen2Tokenizer": TokenizerClass(_qwen2, ClassTokens(_QWEN2, added_again=True)),
    "CohereTokenizer": TokenizerClass(_cohere, ClassTokens(_COHERE, added_again=True)),
    "BertTokenizer": _BERT_CLASS,
    "DistilBertTokenizer": _BERT_CLASS,
    "ElectraTokenizer": _BERT_CLASS,
    "RobertaTokenizer": _ROBERTA_CLASS,
    "BartTokenizer": _ROBERTA_CLASS,
    "XLMRobertaTokenizer": TokenizerClass(_xlm_roberta, ClassTokens(_ROBERTA), "unigram", frame=_bos_and_eos),
}
