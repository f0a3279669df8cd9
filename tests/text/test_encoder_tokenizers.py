"""Tokenizer classes of encoders (BERT's, RoBERTa's, XLM-RoBERTa's) and the cleanup of spaces, as in AutoTokenizer."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer_class import TEXTS, assert_equal_to_transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers_for_tests import CORPUS, byte_level, save

from powerband.text import tokenizer as text_tokenizer
from powerband.text.pieces import IncrementalSpaceCleanup, clean_up_spaces

CONTRACTIONS = "I don't know , he 's here . They 've ! ' quoted ' isn't we 're ?"
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def bert(draw):
    """tokenizer.json says one thing of case and accents, tokenizer_config.json may say another."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=draw.choice([True, False]))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=draw.choice([True, False]))
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=BERT, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, CONTRACTIONS], trainer)
    if draw.random() < 0.5:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def xlm_roberta(draw):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = draw.choice([normalizers.NFKC(), normalizers.Sequence([normalizers.Nmt()])])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=ROBERTA, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, CONTRACTIONS], trainer)
    return tokenizer


def roberta(draw):
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<pad>", "<unk>", AddedToken("<mask>", lstrip=True)])
    return tokenizer


MAKERS = {"bert": bert, "xlm-roberta": xlm_roberta, "roberta": roberta}
CLASSES = {
    "bert": [None, "BertTokenizer", "BertTokenizerFast", "DistilBertTokenizerFast", "PreTrainedTokenizerFast"],
    "xlm-roberta": [None, "XLMRobertaTokenizer", "XLMRobertaTokenizerFast", "PreTrainedTokenizerFast"],
    "roberta": [None, "RobertaTokenizer", "RobertaTokenizerFast", "BartTokenizer", "PreTrainedTokenizerFast"],
}
FLAGS = {
    "do_lower_case": [True, False],
    "strip_accents": [True, False, None],
    "tokenize_chinese_chars": [True, False],
    "add_prefix_space": [True, False],
    "clean_up_tokenization_spaces": [True, False],
}


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("number", range(6))
def test_ids_pairs_and_texts_of_an_encoder_equal_transformers(family, number, tmp_path):
    from transformers import AutoTokenizer

    draw = random.Random(f"{family} {number}")
    config = {name: draw.choice(values) for name, values in FLAGS.items() if draw.random() < 0.6}
    name = CLASSES[family][number % len(CLASSES[family])]
    if name is not None:
        config["tokenizer_class"] = name
    save(MAKERS[family](draw), tmp_path, **config)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert_equal_to_transformers(tmp_path, [*TEXTS, CONTRACTIONS, "É [MASK] or <mask>."])
    ours, theirs = text_tokenizer.Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    pair = theirs("Hello world", "the fox", return_token_type_ids=True)
    ids, second = ours.encode_pair("Hello world", "the fox")
    assert ids == pair["input_ids"]
    if family == "bert":
        assert second == pair["token_type_ids"].index(1)


def test_the_case_that_tokenizer_config_says_counts(tmp_path):
    draw = random.Random(0)
    made = bert(draw)
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    save(made, tmp_path, tokenizer_class="BertTokenizer", do_lower_case=False)
    ours = text_tokenizer.Tokenizer.load(tmp_path)
    assert ours.encode("The THE") != ours.encode("the the")


@given(pieces=st.lists(st.sampled_from([" ", "'", ".", "s", "n't", " '", " 've", "x", "?", "re"]), max_size=24))
def test_text_that_grows_is_cleaned_up_as_the_whole_is(pieces):
    cleanup = IncrementalSpaceCleanup()
    deltas = [cleanup.append(piece) for piece in pieces]
    assert "".join(deltas) + cleanup.flush() == clean_up_spaces("".join(pieces))
