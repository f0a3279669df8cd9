"""Tokenizers whose steps multiply a text, or never end, are refused before they see one."""

import base64

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers_for_tests import byte_level, metaspace, save, sentencepiece, word_pieces

from powerband.errors import EnvironmentFault
from powerband.text import tokenizer as loading
from powerband.text.tokenizer_growth import check_growth

LETTERS = "abcdefghijk"


def made(**steps):
    tokenizer = byte_level()
    for name, step in steps.items():
        setattr(tokenizer, name, step)
    return tokenizer


def replacing(kind, steps):
    return [kind.Replace(LETTERS[i], LETTERS[i + 1] * 10) for i in range(steps)]


def charsmap(replacement):
    return base64.b64encode((4).to_bytes(4, "little") + bytes(4) + replacement + b"\0").decode()


GROWING = {
    "normalizers": made(normalizer=normalizers.Sequence(replacing(normalizers, 6))),
    "decoders": made(decoder=decoders.Sequence(replacing(decoders, 6))),
    "a regex that matches nothing": made(normalizer=normalizers.Replace(Regex(""), "x" * 1000)),
    "a long prefix": made(normalizer=normalizers.Prepend("x" * 1000)),
    "bytes of bytes": made(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 10)),
    "a text many times": made(
        post_processor=processors.TemplateProcessing(single=["$A"] * 300, pair="$A $B", special_tokens=[])
    ),
    "many special tokens": made(
        post_processor=processors.TemplateProcessing(
            single="<s> $A" + " </s>" * 2000, pair="$A $B", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    ),
    "words of any length": Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]", max_input_chars_per_word=10**9)),
}


@pytest.mark.parametrize("name", GROWING)
def test_a_tokenizer_that_grows_text_is_refused_by_the_file_name(name, tmp_path):
    save(GROWING[name], tmp_path)
    with pytest.raises(EnvironmentFault, match=r"tokenizer.json is not a tokenizer that can be used: its .* limit is"):
        loading.Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(),
        sentencepiece(),
        sentencepiece(strip=False),
        metaspace(),
        word_pieces(),
        made(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), "▁")])),
        made(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])),
    ],
)
def test_tokenizers_of_published_shapes_are_taken(tokenizer):
    check_growth(tokenizer)


def test_a_table_of_replacements_counts_by_its_longest():
    class Step:
        def __getstate__(self):
            return b'{"type": "Precompiled", "precompiled_charsmap": "%b"}' % charsmap(b"x" * 500).encode()

    class Built:
        normalizer = Step()
        pre_tokenizer = decoder = post_processor = model = None

    with pytest.raises(ValueError, match="500 times"):
        check_growth(Built())


def test_a_tokenizer_file_of_gigabytes_is_not_read(tmp_path):
    save(byte_level(), tmp_path)
    with (tmp_path / "tokenizer.json").open("r+b") as file:
        file.truncate(3 << 30)
    with pytest.raises(EnvironmentFault, match="limit is 268,435,456"):
        loading.Tokenizer.load(tmp_path)
