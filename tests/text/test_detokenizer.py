"""Incremental detokenization against the tokenizers library's own decoding of the whole."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import CORPUS, byte_level, metaspace, save, sentencepiece, word_pieces

from powerband.text.detokenizer import IncrementalDetokenizer
from powerband.text.tokenizer import Tokenizer

KINDS = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "gemma": lambda: sentencepiece(strip=False),
    "metaspace": metaspace,
    "word_pieces": word_pieces,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return Tokenizer.load(save(KINDS[request.param](), tmp_path_factory.mktemp(request.param)))


def stream(tokenizer, prompt_ids, ids, skip_special_tokens=True):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids, skip_special_tokens)
    return [*(detokenizer.append([id]) for id in ids), detokenizer.flush()]


texts = st.one_of(
    st.lists(st.sampled_from(" ".join(CORPUS[:4]).split(" ")), max_size=8).map(" ".join),
    st.text(alphabet=" aé日🙂👩‍👧\n▁<x0>", max_size=12),
)


@settings(max_examples=150)
@given(prompt=texts, output=texts, data=st.data())
def test_deltas_add_up_to_the_decoded_whole(tokenizer, prompt, output, data):
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(output)
    for _ in range(data.draw(st.integers(0, 2))):
        ids.insert(data.draw(st.integers(0, len(ids))), data.draw(st.sampled_from(sorted(tokenizer.special_ids))))
    skip = data.draw(st.booleans())
    whole, before = tokenizer.decode(prompt_ids + ids, skip), tokenizer.decode(prompt_ids, skip)
    deltas = stream(tokenizer, prompt_ids, ids, skip)
    if whole.startswith(before) and "\ufffd" not in whole:
        assert "".join(deltas) == whole[len(before) :]
        assert all("\ufffd" not in delta for delta in deltas)


@settings(max_examples=100)
@given(data=st.data())
def test_any_ids_give_the_text_that_the_library_gives(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=20))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    ours = "".join(stream(tokenizer, [], ids))
    if "\ufffd" not in whole or (tokenizer.rules and tokenizer.rules.byte_level):
        assert ours == whole


def test_output_continues_a_character_that_the_prompt_began(tmp_path):
    tokenizer = Tokenizer.load(save(byte_level(), tmp_path))
    ids = [tokenizer.token_id(piece) for piece in "ðŁĳ"] + tokenizer.encode("©")[-1:]
    assert "".join(stream(tokenizer, ids[:2], ids[2:]))[0] == b"\xf0\x9f\x91\xa9".decode()


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_invalid_bytes_are_given_out_and_not_held(kind, tmp_path):
    tokenizer = Tokenizer.load(save(KINDS[kind](), tmp_path))
    lead = tokenizer.token_id("ð" if kind == "byte_level" else "<0xF0>")
    deltas = stream(tokenizer, [], [lead] * 10)
    assert deltas == ["", *["\ufffd"] * 10]


def test_time_per_token_does_not_grow_with_the_output(tokenizer):
    ids = tokenizer.encode(" ".join(CORPUS)) * 40
    begin = time.process_time()
    stream(tokenizer, [], ids)
    per_token_s = (time.process_time() - begin) / len(ids)
    assert per_token_s < 200e-6
