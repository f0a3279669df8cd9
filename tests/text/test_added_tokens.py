"""Tokens that only the files beside tokenizer.json name: the same ids and texts as AutoTokenizer."""

import json
import logging
import random

import pytest
from tokenizers import AddedToken
from tokenizers_for_tests import byte_level, save, sentencepiece

from powerband.errors import EnvironmentFault, InvalidRequest
from powerband.text.detokenizer import IncrementalDetokenizer
from powerband.text.tokenizer import Tokenizer

TEXT = "The<|turn|> fox <|end|>\nand<|img|>x <s><|turn|>日 tool call</s>"
NEXT = byte_level().get_vocab_size()


def token(text, **flags):
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": text, **plain, **flags}


def typed(text, **flags):
    return {"__type": "AddedToken", **token(text, **flags)}


DECODER = {str(NEXT): token("<|turn|>"), str(NEXT + 1): token("<|end|>")}
CASES = {
    "added_tokens_decoder": ({"added_tokens_decoder": DECODER, "eos_token": "<|end|>"}, {}),
    "not special": ({"added_tokens_decoder": {str(NEXT): token("<|turn|>", special=False)}}, {}),
    "strips spaces around it": (
        {
            "added_tokens_decoder": {
                str(NEXT): token("<|turn|>", rstrip=True),
                str(NEXT + 1): token("<|end|>", lstrip=True),
            }
        },
        {},
    ),
    "normalized": ({"added_tokens_decoder": {str(NEXT): token("<|turn|>", normalized=True, special=False)}}, {}),
    "single word": ({"added_tokens_decoder": {str(NEXT): token("tool", single_word=True, special=False)}}, {}),
    "ids out of order": ({"added_tokens_decoder": {str(NEXT + 1): token("<|turn|>"), str(NEXT): token("<|end|>")}}, {}),
    "ids with a gap": ({"added_tokens_decoder": {str(NEXT + 90): token("<|turn|>"), "3": token("<|end|>")}}, {}),
    "an empty decoder hides the other files": (
        {"added_tokens_decoder": {}},
        {"added_tokens.json": {"<|turn|>": NEXT}, "special_tokens_map.json": {"eos_token": "<|end|>"}},
    ),
    "a plain token becomes special": (
        {"added_tokens_decoder": {str(NEXT - 2): token("tool call")}, "eos_token": "tool call"},
        {},
    ),
    "special only by its name": (
        {"added_tokens_decoder": {str(NEXT): token("<|end|>", special=False)}, "eos_token": "<|end|>"},
        {},
    ),
    "added_tokens.json": ({"eos_token": "</s>"}, {"added_tokens.json": {"<|turn|>": NEXT, "<|end|>": NEXT + 1}}),
    "added_tokens.json, of which one is named": (
        {"eos_token": "<|end|>"},
        {"added_tokens.json": {"<|turn|>": NEXT, "<|end|>": NEXT + 1}},
    ),
    "special_tokens_map.json": (
        {},
        {"special_tokens_map.json": {"eos_token": token("<|end|>", rstrip=True), "bos_token": "<|turn|>"}},
    ),
    "the map outweighs the config": ({"eos_token": "</s>"}, {"special_tokens_map.json": {"eos_token": "<|end|>"}}),
    "eos only named": ({"eos_token": "<|end|>", "additional_special_tokens": ["<|turn|>"]}, {}),
    "eos as an object": ({"eos_token": typed("<|end|>", lstrip=True)}, {}),
    "extra_special_tokens": ({"extra_special_tokens": ["<|turn|>", "<|end|>"]}, {}),
    "extra_special_tokens as objects": ({"extra_special_tokens": [typed("<|turn|>", rstrip=True)]}, {}),
    "extra_special_tokens as a table": ({"extra_special_tokens": {"image_token": "<|img|>"}}, {}),
    "a table of names of the model's own": ({"model_specific_special_tokens": {"image_token": "<|img|>"}}, {}),
    "a name of the model's own": ({"image_token": "<|img|>", "eos_token": "<|end|>"}, {}),
    "both spellings": ({"extra_special_tokens": ["<|turn|>"], "additional_special_tokens": ["<|end|>"]}, {}),
    "a list and a table": (
        {"additional_special_tokens": ["<|turn|>"], "extra_special_tokens": {"image_token": "<|img|>"}},
        {},
    ),
    "a list in each file": (
        {"additional_special_tokens": ["<|turn|>"]},
        {"special_tokens_map.json": {"additional_special_tokens": ["<|end|>"]}},
    ),
    "an empty list, and one in the map": (
        {"extra_special_tokens": []},
        {"special_tokens_map.json": {"additional_special_tokens": ["<|end|>"]}},
    ),
    "an empty table, and a list in the map": (
        {"extra_special_tokens": {}},
        {"special_tokens_map.json": {"additional_special_tokens": ["<|end|>"]}},
    ),
    "null, and a list in the map": (
        {"additional_special_tokens": None},
        {"special_tokens_map.json": {"additional_special_tokens": ["<|end|>"]}},
    ),
    "lists of one name in both files": (
        {"extra_special_tokens": ["<|turn|>"]},
        {"special_tokens_map.json": {"extra_special_tokens": ["<|end|>", "<|turn|>"]}},
    ),
    "special tokens are split": ({"split_special_tokens": True, "eos_token": "<|end|>"}, {}),
    "nothing": ({}, {}),
}


def checkpoint(folder, make, config, files):
    rust = make()
    rust.add_tokens([AddedToken("tool call", special=False)])
    save(rust, folder, tokenizer_class="PreTrainedTokenizerFast", **config)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def assert_equal_to_transformers(folder):
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    ids = theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert ours.encode(TEXT, add_special_tokens=False) == ids
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.special_tokens == theirs.special_tokens_map
    for skip in (True, False):
        text = theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip_special_tokens=skip) == text
        detokenizer = IncrementalDetokenizer(ours, skip_special_tokens=skip)
        assert "".join(detokenizer.append([id]) for id in ids) + detokenizer.flush() == text


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_those_of_transformers(name, make, tmp_path):
    assert_equal_to_transformers(checkpoint(tmp_path, make, *CASES[name]))


@pytest.mark.parametrize("seed", range(60))
def test_any_mixture_of_files_equals_transformers(seed, tmp_path):
    draw = random.Random(seed)
    texts = ["<|turn|>", "<|end|>", "<|img|>", "tool call", "</s>", "日"]

    def some_token():
        flags = {name: draw.random() < 0.4 for name in ("lstrip", "rstrip", "special", "normalized")}
        return token(draw.choice(texts), **flags)

    config = {name: draw.choice(texts) for name in ("bos_token", "eos_token", "pad_token") if draw.random() < 0.5}
    if draw.random() < 0.6:
        config["added_tokens_decoder"] = {str(NEXT + i): some_token() for i in range(draw.randint(0, 3))}
    for name in ("additional_special_tokens", "extra_special_tokens"):
        if draw.random() < 0.5:
            config[name] = draw.choice([draw.sample(texts, 2), [], None])
    if draw.random() < 0.2:
        config["extra_special_tokens"] = {"image_token": draw.choice(texts)}
    files = {}
    if draw.random() < 0.5:
        files["added_tokens.json"] = {text: NEXT + i for i, text in enumerate(draw.sample(texts, 2))}
    if draw.random() < 0.5:
        files["special_tokens_map.json"] = {"eos_token": some_token(), "unk_token": draw.choice(texts)}
        if draw.random() < 0.5:
            name = draw.choice(["additional_special_tokens", "extra_special_tokens"])
            files["special_tokens_map.json"][name] = draw.sample(texts, 2)
    assert_equal_to_transformers(checkpoint(tmp_path, byte_level, config, files))


def test_an_id_that_the_tokenizer_does_not_give_is_logged(tmp_path, caplog):
    config = {"added_tokens_decoder": {"5000": token("<|turn|>")}}
    with caplog.at_level(logging.WARNING):
        Tokenizer.load(checkpoint(tmp_path, byte_level, config, {}))
    assert "'<|turn|>' the id 5000" in caplog.text


@pytest.mark.parametrize(
    "config",
    [{"added_tokens_decoder": {"x": token("a")}}, {"added_tokens_decoder": ["a"]}, {"extra_special_tokens": [7]}],
)
def test_tokens_in_another_form_are_refused_by_file(config, tmp_path):
    with pytest.raises(EnvironmentFault, match=r"tokens in a form that cannot be read"):
        Tokenizer.load(checkpoint(tmp_path, byte_level, config, {}))


def panicking(folder, normalizer):
    """A tokenizer.json that makes the library panic."""
    state = json.loads(byte_level().to_str())
    state["normalizer"] = normalizer
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return folder


def test_a_tokenizer_that_panics_is_refused_when_loaded(tmp_path):
    folder = panicking(tmp_path, {"type": "Replace", "pattern": {"String": ""}, "content": "xx"})
    with pytest.raises(EnvironmentFault, match=r"tokenizer\.json is not a tokenizer that can be used") as caught:
        Tokenizer.load(folder)
    assert caught.value.code == "tokenizer_format"


class Panicking:
    """The library's tokenizer, of which one text or token makes it panic."""

    def __init__(self, rust):
        self._rust = rust

    def __getattr__(self, name):
        return getattr(self._rust, name)

    def encode_batch_fast(self, *args, **options):
        raise type("PanicException", (BaseException,), {})("index out of bounds")

    def decode(self, *args, **options):
        raise type("PanicException", (BaseException,), {})("index out of bounds")


def test_a_panic_at_run_time_is_an_error_of_the_request(tmp_path):
    tokenizer = Tokenizer.load(checkpoint(tmp_path, byte_level, {}, {}))
    tokenizer._rust = Panicking(tokenizer._rust)
    for call in (lambda: tokenizer.encode("a"), lambda: tokenizer.decode([1])):
        with pytest.raises(InvalidRequest, match="index out of bounds") as caught:
            call()
        assert caught.value.code == "tokenizer_failed"


def test_a_text_that_a_small_vocabulary_lacks_is_an_error_of_the_request(tmp_path):
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import models, pre_tokenizers

    rust = RustTokenizer(models.WordLevel({"a": 0, "b": 1}))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer.load(save(rust, tmp_path))
    assert tokenizer.encode("a b") == [0, 1]
    with pytest.raises(InvalidRequest, match="cannot encode this text"):
        tokenizer.encode("zebra")
