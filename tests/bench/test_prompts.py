"""Prompts made up from keys: what a prefix cache finds in them is what the schedule says, and they are as long."""

import functools
import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from powerband.bench.client.messages import RequestMessage, SegmentMessage, ServerAddress
from powerband.bench.client.prompts import WORDS, ConversationPrompts, PromptMaker, request_bytes

DEMO = Path(__file__).resolve().parents[2] / "src" / "powerband" / "demo" / "tokenizer.json"
# Where `make bench-cpu` keeps the model that it measures: a vocabulary of 150,000 with other words than ours.
LARGE = (
    Path(os.environ.get("POWERBAND_CACHE", Path.home() / ".cache" / "powerband"))
    / "bench/models/qwen3-0.6b/checkpoint/tokenizer.json"
)
CHAT = ServerAddress(base="http://test:1", endpoint="chat", model="m")
COMPLETIONS = ServerAddress(base="http://test:1", endpoint="completions", model="m")

MAKER = PromptMaker()
keys, sizes = st.text(max_size=20), st.integers(1, 3000)


def text(key, tokens, maker=MAKER):
    return maker.text(SegmentMessage(key, tokens))


def request(*segments, turn=0, output_tokens=7):
    return RequestMessage(0, tuple(SegmentMessage(*segment) for segment in segments), output_tokens, turn, 0.0)


@given(key=keys, shorter=sizes, longer=sizes)
def test_equal_keys_begin_alike(key, shorter, longer):
    shorter, longer = sorted((shorter, longer))
    assert text(key, longer).startswith(text(key, shorter))
    assert text(key, longer) == text(key, longer, PromptMaker())  # in another process, too


@given(first=keys, second=keys, tokens=st.integers(8, 200))
def test_different_keys_differ_within_the_first_words(first, second, tokens):
    if first != second:
        assert text(first, tokens).split()[:8] != text(second, tokens).split()[:8]


def test_a_cache_finds_next_to_nothing_between_ten_thousand_keys():
    """Less than a block of 16 by far: of 50 million pairs, none begins with the same five words."""
    beginnings = sorted(text(f"0/{number}", 16).split() for number in range(10_000))
    longest = 0
    for one, other in pairwise(beginnings):
        alike = next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), 16)
        longest = max(longest, alike)
    assert longest < 5


@given(key=keys, tokens=sizes)
def test_a_text_has_as_many_words_as_tokens_and_ends_between_words(key, tokens):
    made = text(key, tokens)
    assert made.endswith(" ")
    assert len(made.split(" ")) == tokens + 1
    assert set(made.split()) <= set(WORDS)


def test_segments_join_between_words_whatever_follows():
    """A prefix of 9 words is the same 9 words of the prompt, not half a word that merges with the next."""
    for key in ("a", "b"):
        body = json.loads(ConversationPrompts(COMPLETIONS, MAKER).body(request(("shared", 9), (key, 5))))
        assert body["prompt"].split()[:9] == text("shared", 9).split()
        assert len(body["prompt"].split()) == 14
        assert not body["prompt"].endswith(" ")


@functools.cache
def tokenizer(path):
    return Tokenizer.from_file(str(path))


def tokens_in(prompt, path):
    return len(tokenizer(path).encode(prompt, add_special_tokens=False).ids)


@pytest.mark.parametrize("path", [LARGE, DEMO], ids=["other words", "demo"])
def test_prompts_are_as_long_as_they_should_be_on_any_vocabulary(path):
    """After the correction that probe.calibrate_prompt_words makes, from two short prompts."""
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    short, long = (tokens_in(text(f"probe {words}", words).rstrip(), path) for words in (64, 320))
    maker = PromptMaker(words_per_token=(320 - 64) / (long - short))
    for number, tokens in enumerate((100, 500, 1000, 2000, 4000)):
        found = tokens_in(text(f"7/{number}", tokens, maker).rstrip(), path)
        assert found == pytest.approx(tokens, rel=0.05 if tokens > 100 else 0.12)


def test_a_shared_prefix_is_shared_tokens():
    """What a prefix cache compares are token ids: the shared words must give the same, whatever comes after them."""
    path = LARGE if LARGE.exists() else DEMO
    prompts = [text("shared", 200) + text(key, 50).rstrip() for key in ("a", "b", "c")]
    ids = [tokenizer(path).encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    alone = tokenizer(path).encode(text("shared", 200).rstrip(), add_special_tokens=False).ids
    assert all(one[: len(alone)] == alone for one in ids)
    assert len({tuple(one[len(alone) : len(alone) + 16]) for one in ids}) == 3


# --- conversations ---------------------------------------------------------------------------------------------------


def test_a_turn_of_a_chat_repeats_what_was_said():
    talk = ConversationPrompts(CHAT, MAKER)
    first = json.loads(talk.body(request(("shared", 4), ("0/0", 3))))
    talk.answered("An answer.")
    second = json.loads(talk.body(request(("0/1", 2), turn=1)))
    assert second["messages"][:1] == first["messages"]
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][1]["content"] == "An answer."


def test_a_turn_of_a_completion_begins_with_all_before_it():
    talk = ConversationPrompts(COMPLETIONS, MAKER)
    first = json.loads(talk.body(request(("0/0", 30))))["prompt"]
    talk.answered(" and so on")
    second = json.loads(talk.body(request(("0/1", 20), turn=1)))["prompt"]
    assert second.startswith(f"{first} and so on ")
    assert len(second.split()) == 30 + 3 + 20


@pytest.mark.parametrize("target", [CHAT, COMPLETIONS], ids=["chat", "completions"])
def test_a_new_conversation_forgets_the_last(target):
    talk, fresh = ConversationPrompts(target, MAKER), ConversationPrompts(target, MAKER)
    talk.body(request(("0/0", 30)))
    talk.answered("Something")
    assert talk.body(request(("0/1", 20))) == fresh.body(request(("0/1", 20)))


# --- in a context ----------------------------------------------------------------------------------------------------


def test_each_word_is_one_token_of_the_demo_model():
    assert all(tokens_in(f" {word}", DEMO) == 1 for word in WORDS)


@given(prefix=st.integers(1, 900), own=st.integers(1, 900), output=st.integers(1, 200), key=keys)
def test_a_prompt_fits_the_demo_models_context_to_the_token(prefix, own, output, key):
    limit = 1024
    target = ServerAddress(base="", endpoint="completions", model="m", max_model_len=limit)
    body = ConversationPrompts(target, MAKER).body(
        request((f"shared {key}", min(prefix, 400)), (key, min(own, limit - 400 - output)), output_tokens=output)
    )
    assert tokens_in(json.loads(body)["prompt"], DEMO) + output <= limit


@given(
    lengths=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 100), st.booleans()), min_size=1, max_size=12),
    extra=st.integers(0, 30),
    recount=st.floats(0.9, 1.05),
)
def test_a_conversation_never_grows_beyond_the_context(lengths, extra, recount):
    """extra: tokens that a chat template adds to each prompt; recount: tokens of an answer when it is read again."""
    limit = 600
    target = ServerAddress(base="", endpoint="chat", model="m", max_model_len=limit, extra_prompt_tokens=extra)
    talk = ConversationPrompts(target, MAKER)
    for number, (prompt, output, _) in enumerate(lengths):
        body = json.loads(talk.body(request((f"{number}", prompt), turn=number, output_tokens=output)))
        prompt_tokens = sum(len(message["content"].split()) for message in body["messages"]) + extra
        assert prompt_tokens + body["max_tokens"] <= limit
        talk.answered(" ".join(["the"] * round(output * recount)), prompt_tokens + output)


@pytest.mark.parametrize("words_per_token", [0.5, 0.75, 1.4])
def test_words_of_unequal_tokens_leave_a_reserve(words_per_token):
    target = ServerAddress(
        base="", endpoint="completions", model="m", max_model_len=1000, words_per_token=words_per_token
    )
    prompts = ConversationPrompts(target, PromptMaker(words_per_token))
    near = json.loads(prompts.body(request(("near", 900), output_tokens=100)))["prompt"]
    assert len(near.split()) == pytest.approx(837 * words_per_token, abs=2)
    far = json.loads(prompts.body(request(("far", 700), output_tokens=100)))["prompt"]
    assert len(far.split()) == pytest.approx(700 * words_per_token, abs=1)


def test_recorded_text_is_sent_as_it_is():
    body = json.loads(ConversationPrompts(CHAT, MAKER).body(request(("key", 3, "Why is the sky\u2028blue?"))))
    assert body["messages"] == [{"role": "user", "content": "Why is the sky\u2028blue?"}]


def test_the_request_is_http_with_the_length_of_its_body():
    body = ConversationPrompts(CHAT, MAKER).body(request(("key", 3)))
    head, _, rest = request_bytes(CHAT, body).partition(b"\r\n\r\n")
    assert rest == body
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nHost: test:1\r\n")
    assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")
