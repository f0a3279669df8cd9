"""From tokens to text: stop strings however the text is cut, characters never split, the right ending."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from powerband.core.params import SamplingParams
from powerband.core.step import ErrorInfo, FinishReason, TokenLogprobs, TokenOutput
from powerband.engine.client.output import OutputDelta, OutputProcessor, StopFinder
from powerband.errors import InvalidRequest
from powerband.text.tokenizer import Tokenizer

EOS = 256


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A token per byte, as in GPT-2's alphabet, and <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<eos>"])
    return Tokenizer(rust, {}, Path())


def run(tokenizer: Tokenizer | None, params: SamplingParams, ids: list[int], sizes: list[int], **end: object):
    """Feed `ids` in pieces of `sizes`; the last piece carries `end`."""
    processor = OutputProcessor(tokenizer, params)
    deltas: list[OutputDelta] = []
    position = 0
    for size in sizes:
        piece = ids[position : position + size]
        position += size
        last = position >= len(ids)
        logprobs = [TokenLogprobs([id], [-1.0], 1) for id in piece] if params.logprobs is not None else None
        output = TokenOutput("r", piece, 0.0, logprobs=logprobs, **(end if last else {}))
        deltas.append(processor.process(output))
        if last or deltas[-1].finish_reason:
            break
    return deltas


def joined(deltas: list[OutputDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_a_stop_string_never_leaks_however_the_text_is_cut(tokenizer: Tokenizer) -> None:
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(generator.choice("aabcé ") for _ in range(40))
        stops = ["".join(generator.choice("aabcé ") for _ in range(generator.randint(1, 5))) for _ in range(3)]
        ids = tokenizer.encode(text)
        sizes = [generator.randint(1, 4) for _ in ids]
        deltas = run(tokenizer, SamplingParams(stop=stops), ids, sizes, finish_reason=FinishReason.LENGTH)
        ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
        if ends:
            end, _, stop = min(ends)
            assert joined(deltas) == text[: end - len(stop)]
            assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, stop)
        else:
            assert joined(deltas) == text
            assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.LENGTH, None)


def test_a_stop_string_asks_for_an_abort_and_ends_the_tokens_where_it_was_complete(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one END two")
    params = SamplingParams(stop=["END"], logprobs=0)
    [first, second] = run(tokenizer, params, ids, [5, 6])
    assert (first.text, first.finish_reason, first.must_abort) == ("one ", None, False)
    assert (second.text, second.finish_reason, second.must_abort) == ("", FinishReason.STOP, True)
    assert second.token_ids == tokenizer.encode("ND")
    assert [row.token_ids[0] for row in second.logprobs] == second.token_ids


def test_no_abort_is_needed_when_the_engine_ended_at_the_same_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("stop.")
    [delta] = run(tokenizer, SamplingParams(stop=["."]), ids, [5], finish_reason=FinishReason.LENGTH)
    assert (delta.finish_reason, delta.stop_reason, delta.must_abort) == (FinishReason.STOP, ".", False)


def test_a_stop_string_is_shown_when_asked_for(tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop=["END"], include_stop_str_in_output=True)
    assert joined(run(tokenizer, params, tokenizer.encode("one END two"), [1] * 11)) == "one END"


def test_what_could_have_become_a_stop_string_is_given_out_at_the_end(tokenizer: Tokenizer) -> None:
    deltas = run(
        tokenizer, SamplingParams(stop=["END"]), tokenizer.encode("an EN"), [1] * 5, finish_reason=FinishReason.LENGTH
    )
    assert [delta.text for delta in deltas] == ["a", "n", " ", "", "EN"]


def test_min_tokens_delays_stop_strings(tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop=["ab"], min_tokens=4, max_tokens=20)
    deltas = run(tokenizer, params, tokenizer.encode("abababab"), [1] * 8)
    assert joined(deltas) == "abab"
    assert sum(len(delta.token_ids) for delta in deltas) == 6


def test_characters_are_never_split(tokenizer: Tokenizer) -> None:
    text = "naïve 👩‍🚀 日本"
    ids = tokenizer.encode(text)
    deltas = run(tokenizer, SamplingParams(), ids, [1] * len(ids), finish_reason=FinishReason.LENGTH)
    assert joined(deltas) == text
    assert not any("\ufffd" in delta.text for delta in deltas)


def test_half_a_character_at_the_end_becomes_one_replacement(tokenizer: Tokenizer) -> None:
    deltas = run(tokenizer, SamplingParams(), tokenizer.encode("é")[:1], [1], finish_reason=FinishReason.LENGTH)
    assert joined(deltas) == "\ufffd"


@pytest.mark.parametrize("include", [False, True])
def test_the_text_of_a_stop_token_is_left_out_unless_asked_for(tokenizer: Tokenizer, include: bool) -> None:
    ids = tokenizer.encode("yes!")
    params = SamplingParams(stop_token_ids=[ids[-1]], include_stop_str_in_output=include)
    [delta] = run(tokenizer, params, ids, [4], finish_reason=FinishReason.STOP, stop_token_id=ids[-1])
    assert delta.text == ("yes!" if include else "yes")
    assert delta.token_ids == ids
    assert delta.stop_reason == ids[-1]


def test_eos_is_no_stop_reason_and_has_no_text(tokenizer: Tokenizer) -> None:
    params = SamplingParams(eos_token_ids=[EOS], skip_special_tokens=False)
    ids = [*tokenizer.encode("yes"), EOS]
    [delta] = run(tokenizer, params, ids, [4], finish_reason=FinishReason.STOP, stop_token_id=EOS)
    assert (delta.text, delta.stop_reason, delta.finish_reason) == ("yes", None, FinishReason.STOP)


def test_an_ignored_eos_is_shown_only_with_special_tokens(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a"), EOS, *tokenizer.encode("b")]
    shown = [
        joined(run(tokenizer, SamplingParams(skip_special_tokens=skip, ignore_eos=True), ids, [3]))
        for skip in (True, False)
    ]
    assert shown == ["ab", "a<eos>b"]


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    deltas = run(None, SamplingParams(), [5, 6, 7], [1, 2], finish_reason=FinishReason.LENGTH)
    assert joined(deltas) == ""
    assert [delta.token_ids for delta in deltas] == [[5], [6, 7]]


def test_an_error_passes_through_and_nothing_follows_an_end(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer, SamplingParams())
    error = ErrorInfo("not_finite", "no numbers")
    delta = processor.process(TokenOutput("r", [], 0.0, FinishReason.ERROR, error=error))
    assert (delta.finish_reason, delta.error) == (FinishReason.ERROR, error)
    assert processor.process(TokenOutput("r", [1, 2], 0.0)) == OutputDelta()


def test_hostile_stop_strings_stay_cheap() -> None:
    finder = StopFinder(["a" * 255 + chr(ord("b") + i) for i in range(16)])
    shown = "".join(finder.feed("a") for _ in range(3000))
    assert len(shown) == 3000 - 255
    assert finder.feed("c") == ""
    assert finder.found == "a" * 255 + "c"


IM_END, IM_START = "<|im_end|>", "<|im_start|>"


@pytest.fixture(scope="module")
def chat_tokenizer() -> Tokenizer:
    """A token per byte, and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([IM_END, IM_START])
    return Tokenizer(rust, {}, Path())


WRITTEN = f"AB{IM_END}\n{IM_START}CD"


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    ("stop", "text", "found"),
    [
        ([IM_END], "AB", IM_END),
        ([IM_END + "\n"], "AB", IM_END + "\n"),
        (["B" + IM_END], "A", "B" + IM_END),
        (["\n" + IM_START], "AB", "\n" + IM_START),
        ([IM_END + "\n" + IM_START + "C"], "AB", IM_END + "\n" + IM_START + "C"),
        (["B", IM_END], "A", "B"),
        (["B" + IM_END + "\n", "B" + IM_END], "A", "B" + IM_END),
        (["\n", IM_END + "\n"], "AB", IM_END + "\n"),
        (["AB" + IM_START, "D"], None, "D"),
    ],
)
def test_a_stop_string_with_a_special_token_ends_the_output_before_it(
    chat_tokenizer: Tokenizer, stop: list[str], text: str | None, found: str, skip: bool
) -> None:
    ids = chat_tokenizer.encode(WRITTEN)
    deltas = run(chat_tokenizer, SamplingParams(stop=stop, skip_special_tokens=skip), ids, [1] * len(ids))
    end = WRITTEN.index(found)
    shown = WRITTEN[:end].replace(IM_END, "").replace(IM_START, "") if skip else WRITTEN[:end]
    assert joined(deltas) == shown
    assert text is None or not skip or shown == text
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, found)


def test_streams_show_nothing_of_a_stop_string_with_special_tokens_however_the_text_is_cut(
    chat_tokenizer: Tokenizer,
) -> None:
    generator = random.Random(1)
    parts = ["a", "b", " ", "é", IM_END, IM_START]
    for _ in range(500):
        written = "".join(generator.choice(parts) for _ in range(30))
        stops = ["".join(generator.choice(parts) for _ in range(generator.randint(1, 4))) for _ in range(3)]
        stops = [stop for stop in stops if IM_END in stop or IM_START in stop]
        ids = chat_tokenizer.encode(written)
        sizes = [generator.randint(1, 4) for _ in ids]
        deltas = run(chat_tokenizer, SamplingParams(stop=stops), ids, sizes, finish_reason=FinishReason.LENGTH)
        ends = [(written.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in written]
        whole = written[: min(ends)[0] + min(ends)[1]] if ends else written
        assert joined(deltas) == whole.replace(IM_END, "").replace(IM_START, "")
        assert deltas[-1].stop_reason == (min(ends)[2] if ends else None)


def test_other_stop_strings_do_not_match_inside_a_special_token_that_is_skipped(chat_tokenizer: Tokenizer) -> None:
    ids = chat_tokenizer.encode(WRITTEN)
    params = SamplingParams(stop=["|>", "im_end", "B\nC"])
    deltas = run(chat_tokenizer, params, ids, [1] * len(ids), finish_reason=FinishReason.LENGTH)
    assert joined(deltas) == "A"
    assert deltas[-1].stop_reason == "B\nC"  # as the text that is given out has it


def test_a_special_stop_string_is_shown_when_asked_for_and_delayed_by_min_tokens(chat_tokenizer: Tokenizer) -> None:
    ids = chat_tokenizer.encode(WRITTEN + IM_END)
    shown = run(chat_tokenizer, SamplingParams(stop=[IM_END], include_stop_str_in_output=True), ids, [1] * len(ids))
    assert joined(shown) == "AB" + IM_END
    late = run(chat_tokenizer, SamplingParams(stop=[IM_END], min_tokens=5), ids, [1] * len(ids))
    assert joined(late) == "AB\nCD"
    assert late[-1].finish_reason is FinishReason.STOP


def test_an_output_with_a_special_stop_string_cannot_be_resumed(chat_tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(chat_tokenizer, SamplingParams(stop=["B" + IM_END]))
    with pytest.raises(InvalidRequest, match="contain the stop string"):
        processor.resume(chat_tokenizer.encode(WRITTEN))
