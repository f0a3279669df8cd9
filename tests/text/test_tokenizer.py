"""Tokenizer: loading, BOS rules as transformers has them, bytes of tokens, errors."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers_for_tests import byte_level, save, sentencepiece, with_bos

from powerband.errors import EnvironmentFault, InvalidRequest
from powerband.text.tokenizer import Tokenizer

TEXT = "The Würde of 東京 🙂, again"


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_text_survives_encode_and_decode(make, tmp_path):
    tokenizer = Tokenizer.load(save(make(), tmp_path))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_bytes_of_tokens_join_to_the_text(make, tmp_path):
    tokenizer = Tokenizer.load(save(make(), tmp_path))
    joined = b"".join(tokenizer.token_bytes(id) for id in tokenizer.encode(TEXT))
    assert joined.decode().strip() == TEXT


def test_bos_comes_from_the_post_processor(tmp_path):
    tokenizer = Tokenizer.load(save(with_bos(byte_level()), tmp_path, bos_token="<s>"))
    bos = tokenizer.bos_token_id
    assert tokenizer.encode("fox")[0] == bos
    assert bos not in tokenizer.encode("fox", add_special_tokens=False)


@pytest.mark.parametrize("post_processor", [False, True])
@pytest.mark.parametrize("add_bos_token", [None, False, True])
def test_bos_rules_equal_those_of_transformers(post_processor, add_bos_token, tmp_path):
    from transformers import AutoTokenizer

    rust = with_bos(byte_level()) if post_processor else byte_level()
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if add_bos_token is not None:
        config["add_bos_token"] = add_bos_token
    folder = save(rust, tmp_path, **config)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert Tokenizer.load(folder).encode("The fox") == theirs("The fox")["input_ids"]


def test_special_tokens_may_be_objects(tmp_path):
    folder = save(byte_level(), tmp_path, eos_token={"content": "</s>", "special": True})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.special_tokens == {"eos_token": "</s>"}
    assert tokenizer.eos_token_id == tokenizer.token_id("</s>")
    assert tokenizer.special_ids == {tokenizer.token_id(t) for t in ["<s>", "</s>", "<|im_start|>"]}


def test_ids_outside_the_vocabulary_stand_for_nothing(tmp_path):
    tokenizer = Tokenizer.load(save(byte_level(), tmp_path))
    assert tokenizer.token(tokenizer.vocab_size + 5) == ""
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""


def test_a_folder_without_a_tokenizer_gives_none(tmp_path):
    assert Tokenizer.load(tmp_path) is None


def test_a_legacy_tokenizer_says_how_to_convert_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(EnvironmentFault, match=r"tokenizer\.model but no tokenizer\.json.*save_pretrained"):
        Tokenizer.load(tmp_path)


def test_a_damaged_tokenizer_is_an_environment_fault(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(EnvironmentFault, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_half_a_surrogate_pair_is_the_users_mistake(tmp_path):
    tokenizer = Tokenizer.load(save(byte_level(), tmp_path))
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode("a\ud83d")


def test_threads_may_share_a_tokenizer(tmp_path):
    tokenizer = Tokenizer.load(save(byte_level(), tmp_path))
    texts = [f"{TEXT} {i}" for i in range(200)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda text: tokenizer.decode(tokenizer.encode(text)), texts)) == texts


def test_other_threads_run_while_a_long_text_is_encoded(tmp_path):
    tokenizer = Tokenizer.load(save(byte_level(), tmp_path))
    with ThreadPoolExecutor(1) as thread:
        thread.submit(tokenizer.encode, "warm").result()
        start_s = last_s = time.perf_counter()
        longest_pause_s = 0.0
        encoding = thread.submit(tokenizer.encode, "a" * 1_000_000)
        while not encoding.done():
            longest_pause_s = max(longest_pause_s, time.perf_counter() - last_s)
            last_s = time.perf_counter()
        longest_pause_s = max(longest_pause_s, time.perf_counter() - last_s)
    assert longest_pause_s < (time.perf_counter() - start_s) / 2
