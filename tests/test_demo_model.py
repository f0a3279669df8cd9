"""The model in the package: small, readable by other libraries, and right about what it was taught."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import powerband
from powerband.text.eval_tasks import KINDS, eval_tasks

FOLDER = Path(powerband.__file__).parent / "demo"


@pytest.fixture(scope="module")
def tokenizer() -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> AutoModelForCausalLM:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def answer(
    model: AutoModelForCausalLM, tokenizer: AutoTokenizer, messages: list[dict[str, Any]], tools: Any = None
) -> str:
    prompt = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=96, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def reply(model: AutoModelForCausalLM, tokenizer: AutoTokenizer, question: str) -> str:
    return answer(model, tokenizer, [{"role": "user", "content": question}])


def test_it_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir() if file.is_file()) <= 20_000_000


def test_it_has_the_shape_that_the_card_says(model: AutoModelForCausalLM) -> None:
    assert 5_000_000 <= model.num_parameters() <= 8_000_000
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2]
    assert all(side % 128 == 0 for matrix in matrices for side in matrix.shape)


def test_it_stops_after_a_turn_and_after_a_text(tokenizer: AutoTokenizer) -> None:
    ids = json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"]
    assert [tokenizer.decode([id]) for id in ids] == ["<|im_end|>", "<|endoftext|>"]


def test_digits_are_tokens_of_their_own(tokenizer: AutoTokenizer) -> None:
    assert tokenizer.tokenize("1024") == ["1", "0", "2", "4"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_what_it_was_taught(kind: str, model: AutoModelForCausalLM, tokenizer: AutoTokenizer) -> None:
    asked = list(islice(eval_tasks(kind, seed=3, held_out=True), 5))
    right = [exercise.is_right(reply(model, tokenizer, exercise.question)) for exercise in asked]
    assert sum(right) >= 4


def test_it_tells_what_a_function_does(model: AutoModelForCausalLM, tokenizer: AutoTokenizer) -> None:
    answer = reply(model, tokenizer, "What does os.path.join do?")
    assert answer == "Join two or more pathname components, inserting '/' as needed."


def test_it_says_what_it_is(model: AutoModelForCausalLM, tokenizer: AutoTokenizer) -> None:
    assert "demonstration, not an assistant" in reply(model, tokenizer, "Who are you?")


def test_it_calls_a_tool_and_reads_its_result(model: AutoModelForCausalLM, tokenizer: AutoTokenizer) -> None:
    parameters = {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]}
    tools = [
        {"type": "function", "function": {"name": "get_price", "description": "Prices.", "parameters": parameters}}
    ]
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the price of bread?"}]
    call = {"name": "get_price", "arguments": {"item": "bread"}}
    called = answer(model, tokenizer, messages, tools)
    assert json.loads(called.removeprefix("<tool_call>").removesuffix("</tool_call>")) == call
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "482"},
    ]
    assert answer(model, tokenizer, messages, tools) == "It is 482."
