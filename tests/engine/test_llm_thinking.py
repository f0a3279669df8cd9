"""`LLM.chat` with a budget of reasoning tokens: the reasoning ends with it, and the model goes on with its answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from powerband import LLM, SamplingParams
from powerband.errors import InvalidRequest
from text.templates import QWEN3

USER = [{"role": "user", "content": "What is the weather in Berlin?"}]
OPEN = QWEN3 + "{{ '<think>\n' if add_generation_prompt }}"  # as templates of models that always reason


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(OPEN)
    settings: dict[str, Any] = {"load_format": "dummy", "dtype": "float32", "device": "cpu", "threads": 1}
    with LLM("demo", chat_template=str(template), kv_cache_memory="32MiB", max_model_len=512, **settings) as llm:
        yield llm


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": 3, "max_tokens": 40, "ignore_eos": True, **values})


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_budget_ends_the_reasoning(llm: LLM, budget: int) -> None:
    asked = params(n=3, logprobs=1)
    [result] = llm.chat(USER, asked, thinking_token_budget=budget, use_tqdm=False)
    [free] = llm.chat(USER, asked, use_tqdm=False)
    for output, unlimited in zip(result.outputs, free.outputs, strict=True):
        assert not unlimited.content
        assert output.token_ids[:budget] == unlimited.token_ids[:budget]
        closing = output.token_ids[budget : budget + 20]
        assert "</think>" in llm.get_tokenizer().decode(closing)
        assert output.content  # it goes on after the reasoning
        assert len(output.token_ids) == len(output.logprobs or ()) == 40
        assert output.finish_reason == "length"


def test_what_comes_after_the_budget_is_what_the_model_says_after_that_text(llm: LLM) -> None:
    greedy = params(temperature=0)
    [result] = llm.chat(USER, greedy, thinking_token_budget=5, use_tqdm=False)
    tokenizer, ids = llm.get_tokenizer(), result.outputs[0].token_ids
    size = next(end for end in range(6, 40) if "</think>" in tokenizer.decode(ids[:end]))
    while not tokenizer.decode(ids[5:size]).endswith("\n\n"):
        size += 1
    [plain] = llm.generate([result.prompt_token_ids + ids[:size]], params(temperature=0, max_tokens=40 - size))
    assert plain.outputs[0].token_ids == ids[size:]


def test_a_budget_without_room_for_an_answer_changes_nothing(llm: LLM) -> None:
    short = params(max_tokens=4)
    [limited] = llm.chat(USER, short, thinking_token_budget=3, use_tqdm=False)
    [free] = llm.chat(USER, short, thinking_token_budget=-1, use_tqdm=False)
    assert limited.outputs[0].token_ids == free.outputs[0].token_ids


def test_a_stop_string_in_the_text_that_ends_the_reasoning_ends_the_answer(llm: LLM) -> None:
    for budget in (0, 3):
        [result] = llm.chat(USER, params(stop=["</think>"]), thinking_token_budget=budget, use_tqdm=False)
        assert (result.outputs[0].finish_reason, result.outputs[0].stop_reason) == ("stop", "</think>")


def test_a_wrong_budget_is_refused(llm: LLM) -> None:
    for wrong in (-2, 1.5, "3"):
        with pytest.raises(InvalidRequest, match="thinking_token_budget"):
            llm.chat(USER, params(), thinking_token_budget=wrong, use_tqdm=False)  # type: ignore[arg-type]
