"""Every field of SamplingParams is checked, and the error names the field, the value and the limit."""

from __future__ import annotations

import math
from typing import Any

import pytest

from powerband.core.params import SamplingParams
from powerband.errors import InvalidRequest

WRONG: list[tuple[str, Any, str]] = [
    ("n", 0, "n is 0; it must be between 1 and 128."),
    ("n", 129, "n is 129; it must be between 1 and 128."),
    ("n", True, "n is True; it must be a whole number."),
    ("n", 1.0, "n is 1.0; it must be a whole number."),
    ("max_tokens", 0, "max_tokens is 0; it must be between 1 and 2147483647."),
    ("max_tokens", "5", "max_tokens is '5'; it must be a whole number."),
    ("min_tokens", 17, "min_tokens is 17; it must not exceed max_tokens, which is 16."),
    ("min_tokens", -1, "min_tokens is -1; it must be between 0 and 2147483647."),
    ("temperature", -0.1, "temperature is -0.1; it must be between 0 and 100."),
    ("temperature", math.nan, "temperature is nan; it must be between 0 and 100."),
    ("temperature", math.inf, "temperature is inf; it must be between 0 and 100."),
    ("temperature", None, "temperature is None; it must be a number."),
    ("top_k", -2, "top_k is -2; it must be between -1 and 2147483647."),
    ("top_p", 0, "top_p is 0; it must be greater than 0."),
    ("top_p", 1.01, "top_p is 1.01; it must be between 0 and 1."),
    ("min_p", -0.5, "min_p is -0.5; it must be between 0 and 1."),
    ("repetition_penalty", 0.0, "repetition_penalty is 0; it must be greater than 0."),
    ("repetition_penalty", math.inf, "repetition_penalty is inf; it must be between 0.01 and 100."),
    ("presence_penalty", 2.1, "presence_penalty is 2.1; it must be between -2 and 2."),
    ("frequency_penalty", -3, "frequency_penalty is -3; it must be between -2 and 2."),
    ("seed", 2**63, f"seed is {2**63}; it must be between {-(2**63)} and {2**63 - 1}."),
    ("logprobs", 21, "logprobs is 21; it must be between 0 and 20."),
    ("prompt_logprobs", -1, "prompt_logprobs is -1; it must be between 0 and 20."),
    ("ignore_eos", 1, "ignore_eos is 1; it must be true or false."),
    ("stop", ["x"] * 17, "stop has 17 entries; the limit is 16."),
    ("stop", 5, "stop is 5; it must be a list."),
    ("stop.0", [""], "stop.0 is ''; it must be a string that is not empty."),
    ("stop.1", ["a", "é" * 129], "stop.1 has 258 bytes; the limit is 256."),
    ("bad_words.0", [3], "bad_words.0 is 3; it must be a string that is not empty."),
    ("bad_words_token_ids.0", [[]], "bad_words_token_ids.0 is []; it must be not empty."),
    ("stop_token_ids.1", [1, -5], "stop_token_ids.1 is -5; it must be between 0 and 2147483647."),
    ("allowed_token_ids", [1] * 65_537, "allowed_token_ids has 65537 entries; the limit is 65536."),
    ("allowed_token_ids", [], "allowed_token_ids is []; it must be left out or not empty, since nothing could be"),
    ("logit_bias", dict.fromkeys(range(65_537), 1.0), "logit_bias has 65537 entries; the limit is 65536."),
    ("logit_bias", {"5": 1.0}, "logit_bias is '5'; it must be a whole number."),
    ("logit_bias.5", {5: 101.0}, "logit_bias.5 is 101.0; it must be between -100 and 100."),
    ("logit_bias.5", {5: math.nan}, "logit_bias.5 is nan; it must be between -100 and 100."),
    ("logit_bias", [1], "logit_bias is [1]; it must be an object from token id to bias."),
]


@pytest.mark.parametrize(("param", "value", "message"), WRONG, ids=lambda item: str(item)[:24])
def test_a_wrong_value_is_refused_by_name(param: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{param.split(".")[0]: value})
    assert caught.value.param == param
    assert caught.value.message.startswith(message)


def test_the_limits_themselves_are_accepted() -> None:
    params = SamplingParams(
        n=16, max_tokens=None, min_tokens=99, temperature=100, top_k=-1, top_p=1, min_p=1, repetition_penalty=100,
        presence_penalty=-2, frequency_penalty=2, logit_bias=dict.fromkeys(range(65_536), 100), seed=-(2**63),
        stop=["x" * 256] * 16, logprobs=20, prompt_logprobs=20, stop_token_ids=[0] * 1024,
    )  # fmt: skip
    assert (params.n, params.seed, len(params.stop or [])) == (16, -(2**63), 16)


def test_a_single_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="\n").stop == ["\n"]


def test_token_ids_beyond_the_vocabulary_are_refused() -> None:
    SamplingParams(logit_bias={99: 1.0}, stop_token_ids=[99], bad_words_token_ids=[[99, 98]]).check_vocabulary(100)
    for fields in ({"logit_bias": {100: 1.0}}, {"stop_token_ids": [100]}, {"allowed_token_ids": [3, 100]}):
        with pytest.raises(InvalidRequest, match="names token 100; the model's vocabulary ends at 99") as caught:
            SamplingParams(**fields).check_vocabulary(100)
        assert caught.value.param == next(iter(fields))


def test_bad_words_become_token_ids_with_and_without_a_space() -> None:
    encode = {"cat": [1], " cat": [2], "sun": [3, 4], " sun": [5], "hot dog": [6, 7], " hot dog": [8, 7]}
    params = SamplingParams(bad_words=["cat", " sun", "hot dog"]).with_bad_word_ids(encode.__getitem__)
    assert params.bad_words_token_ids == [[1], [2], [3, 4], [6, 7], [8, 7]]
