"""Tokenizer classes that build their steps themselves: the same ids and texts as AutoTokenizer."""

import json
import random

import pytest
from tokenizers import pre_tokenizers
from tokenizers_for_tests import byte_level, save, sentencepiece, with_bos

from powerband.text.chat_template import ChatTemplate
from powerband.text.detokenizer import IncrementalDetokenizer
from powerband.text.tokenizer import Tokenizer

TEXTS = [
    *("", " ", "Hello world", " leading", "  two", "a\n\nb\t c 12345 3.14", "ﬁ Ⅷ é e\u0301", "東京は日本 🙂 x"),
    *("<s>[INST] The fox [/INST] a </s><s>[INST] b", "<|im_start|>user\nyo<|turn|> x <|turn|>", "▁x ▁", "added word"),
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


def single_digits():
    tokenizer = byte_level()
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


BYTE_LEVEL = {
    "byte level": byte_level,
    "byte level with BOS": lambda: with_bos(byte_level()),
    "single digits": single_digits,
}
PIECES = {
    "SentencePiece": sentencepiece,
    "SentencePiece with BOS": lambda: with_bos(sentencepiece()),
    "no leading space": lambda: sentencepiece(strip=False),
}
BYTE_CLASSES = ["Qwen2Tokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizerFast", "CohereTokenizerFast"]
PIECE_CLASSES = ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "GemmaTokenizerFast"]
MODEL_TYPES = [
    *(None, "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gemma3_text", "phi3", "olmo2"),
    *("gpt_oss", "mixtral"),
]


def write(folder, make, model_type, **config):
    save(make(), folder, **config)
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def assert_equal_to_transformers(folder, texts=TEXTS):
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map
    for text in texts:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special) == ids, text
            for skip in (True, False):
                decoded = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == decoded
                detokenizer = IncrementalDetokenizer(ours, skip_special_tokens=skip)
                assert "".join(detokenizer.append([id]) for id in ids) + detokenizer.flush() == decoded


@pytest.mark.parametrize("model_type", [None, "llama", "mistral", "phi3", "qwen2"])
@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize("add_prefix_space", [None, False, True])
def test_legacy_and_prefix_space_of_a_llama_equal_transformers(legacy, add_prefix_space, model_type, tmp_path):
    given = {"legacy": legacy, "add_prefix_space": add_prefix_space}
    config = {name: value for name, value in given.items() if value is not None}
    make = PIECES["SentencePiece with BOS"] if model_type != "qwen2" else BYTE_LEVEL["byte level"]
    name = "LlamaTokenizer"
    assert_equal_to_transformers(write(tmp_path, make, model_type, tokenizer_class=name, bos_token="<s>", **config))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_conversation_of_a_llama_has_the_ids_of_transformers(legacy, tmp_path):
    from transformers import AutoTokenizer

    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "chat_template": TEMPLATE}
    write(tmp_path, PIECES["SentencePiece with BOS"], "llama", **config)
    messages = [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Hi you"},
        {"role": "user", "content": " more"},
    ]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, return_dict=False)
    ours = Tokenizer.load(tmp_path)
    template = ChatTemplate.load(ours)
    try:
        assert ours.encode(template.render(messages), add_special_tokens=False) == theirs
    finally:
        template.close()


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, *PIECES])
@pytest.mark.parametrize("number", range(8))
def test_every_class_equals_transformers(kind, number, tmp_path):
    """The classes that fit the vocabulary, all keys that they read, of every model type."""
    make = (BYTE_LEVEL | PIECES)[kind]
    draw = random.Random(f"{kind} {number}")
    name = (BYTE_CLASSES if kind in BYTE_LEVEL else PIECE_CLASSES)[number % 4]
    model_types = [t for t in MODEL_TYPES if t != "qwen2" or kind in BYTE_LEVEL]
    if number >= 4 and kind in BYTE_LEVEL:
        name = draw.choice(["PreTrainedTokenizerFast", "LlamaTokenizerFast", name])
    config = {name: draw.choice([True, False]) for name in ("legacy", "add_prefix_space") if draw.random() < 0.5}
    if draw.random() < 0.5:
        config["bos_token"] = draw.choice(["<s>", "<|turn|>", None])
    if draw.random() < 0.5:
        tokens = {**make().get_added_tokens_decoder()}
        flags = ("content", "lstrip", "rstrip", "normalized", "single_word", "special")
        config["added_tokens_decoder"] = {
            str(id): {flag: getattr(token, flag) for flag in flags} for id, token in tokens.items()
        }
    folder = write(tmp_path, make, draw.choice(model_types), tokenizer_class=name, **config)
    assert_equal_to_transformers(folder)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "mistral", "llama"])
def test_without_a_class_the_model_type_decides(model_type, tmp_path):
    make = byte_level if model_type == "qwen3" else sentencepiece
    assert_equal_to_transformers(write(tmp_path, make, model_type))


def test_the_class_may_stand_in_config_json(tmp_path):
    save(sentencepiece(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}))
    assert_equal_to_transformers(tmp_path)


@pytest.mark.parametrize(("make", "name"), [(byte_level, "GemmaTokenizer"), (sentencepiece, "Qwen2Tokenizer")])
def test_a_class_for_another_kind_of_vocabulary_leaves_tokenizer_json_as_it_is(make, name, tmp_path):
    plain = Tokenizer.load(save(make(), tmp_path / "plain"))
    ours = Tokenizer.load(save(make(), tmp_path / "named", tokenizer_class=name))
    assert [ours.encode(text) for text in TEXTS] == [plain.encode(text) for text in TEXTS]
