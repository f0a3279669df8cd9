"""`powerband.LLM`: results in order and in vLLM's shape, errors before anything starts, failures alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import VOCAB_SIZE, random_model, save

from powerband import LLM, SamplingParams
from powerband.errors import InvalidRequest, RequestTooLong, UsageError

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "block_size": 8,
    "max_num_seqs": 8,
    "max_model_len": 256,
    "kv_cache_memory": "2MiB",
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model("qwen3"), tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """Token ids only: the checkpoint has no tokenizer."""
    with LLM(str(folder), **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM("demo", **{**SETTINGS, "kv_cache_memory": "16MiB"}) as llm:
        yield llm


def prompts(count: int, length: int = 9) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCAB_SIZE, (count, length), generator=generator).tolist()


def tokens(results: list[Any]) -> list[list[list[int]]]:
    return [[output.token_ids for output in result.outputs] for result in results]


def run(llm: LLM, *args: Any, **kwargs: Any) -> list[Any]:
    return llm.generate(*args, use_tqdm=False, **kwargs)


def test_results_come_in_the_order_of_the_prompts_whoever_ends_first(llm: LLM) -> None:
    asked = prompts(20)
    params = [SamplingParams(temperature=0.0, max_tokens=20 - i) for i in range(20)]
    results = run(llm, asked, params)
    assert [result.prompt_token_ids for result in results] == asked
    assert [len(result.outputs[0].token_ids) for result in results] == list(range(20, 0, -1))
    assert all(result.finished and result.outputs[0].finish_reason == "length" for result in results)
    alone = [run(llm, prompt, one)[0] for prompt, one in zip(asked, params, strict=True)]
    assert tokens(alone) == tokens(results)


def test_a_prompt_has_several_forms(llm: LLM) -> None:
    one = prompts(1)[0]
    forms: list[Any] = [one, [one], [tuple(one)], {"prompt_token_ids": one}, [{"prompt_token_ids": one}]]
    assert len({str(tokens(run(llm, form, GREEDY))) for form in forms}) == 1
    assert run(llm, []) == []


def test_a_script_may_use_everything_that_vllm_returns(demo: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=2, prompt_logprobs=1)
    [result] = run(demo, ["The list is"], params)
    assert result.prompt == "The list is"
    tokenizer = demo.get_tokenizer()
    assert tokenizer is not None
    assert result.prompt_token_ids == tokenizer.encode("The list is")
    [output] = result.outputs
    assert output.text == tokenizer.decode(output.token_ids)
    assert output.logprobs is not None
    for token, alternatives in zip(output.token_ids, output.logprobs, strict=True):
        assert next(iter(alternatives)) == token
        assert alternatives[token].rank == 1
        assert alternatives[token].decoded_token == tokenizer.token_bytes(token).decode()
        assert [entry.rank for entry in alternatives.values()] == [1, 2]
    sums = sum(
        alternatives[token].logprob for token, alternatives in zip(output.token_ids, output.logprobs, strict=True)
    )
    assert output.cumulative_logprob == pytest.approx(sums)
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    for token, row in zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True):
        assert row is not None
        assert token in row
    assert output.metrics is not None
    assert output.metrics.ttft_s is not None
    assert output.metrics.output_tokens == 4


def test_logprobs_equal_transformers(llm: LLM) -> None:
    model = random_model("qwen3")
    [prompt] = prompts(1, 70)
    [result] = run(llm, [prompt], SamplingParams(max_tokens=6, seed=3, logprobs=0, prompt_logprobs=0))
    [output] = result.outputs
    with torch.no_grad():
        exact = model(torch.tensor([prompt + output.token_ids])).logits[0].log_softmax(-1)
    rows = [*result.prompt_logprobs[1:], *output.logprobs]
    for position, (token, row) in enumerate(zip([*prompt[1:], *output.token_ids], rows, strict=True)):
        assert row[token].logprob == pytest.approx(exact[position, token].item(), abs=2e-3)


def test_n_answers_share_the_prompt_and_take_seeds_in_a_row(llm: LLM) -> None:
    [prompt] = prompts(1, 40)
    llm.reset_prefix_cache()
    [result] = run(llm, [prompt], SamplingParams(n=4, seed=10, max_tokens=10))
    assert [output.index for output in result.outputs] == [0, 1, 2, 3]
    assert [output.metrics.cached_tokens for output in result.outputs] == [0, 32, 32, 32]
    singles = [run(llm, [prompt], SamplingParams(seed=10 + i, max_tokens=10))[0] for i in range(4)]
    assert [output.token_ids for output in result.outputs] == [single.outputs[0].token_ids for single in singles]
    assert len({tuple(output.token_ids) for output in result.outputs}) == 4


def test_answers_without_a_seed_differ(llm: LLM) -> None:
    [result] = run(llm, prompts(1), SamplingParams(n=3, max_tokens=10))
    assert len({tuple(output.token_ids) for output in result.outputs}) == 3


@pytest.mark.parametrize("overlap", [False, True])
def test_overlap_and_a_tight_cache_change_no_token(folder: Path, llm: LLM, overlap: bool) -> None:
    params = [
        SamplingParams(seed=1, max_tokens=40, frequency_penalty=1.5),
        SamplingParams(temperature=0.0, max_tokens=40, repetition_penalty=1.5),
        SamplingParams(seed=2, max_tokens=40, top_p=0.8, presence_penalty=1.0, min_tokens=20, stop_token_ids=[3, 5]),
        SamplingParams(seed=3, max_tokens=40, bad_words_token_ids=[[a, b] for a in range(0, 160, 4) for b in (1, 2)]),
        SamplingParams(seed=4, max_tokens=40, top_k=5, logit_bias={7: 3.0}),
    ] * 2
    asked = prompts(10, 30)
    roomy = run(llm, asked, params)
    assert all(output.token_ids for result in roomy for output in result.outputs)
    tight = {**SETTINGS, "kv_cache_memory": "128KiB", "max_model_len": 80, "async_scheduling": overlap}
    with LLM(str(folder), **tight) as other:
        assert tokens(run(other, asked, params)) == tokens(roomy)
        assert other._engine.scheduler.stats().num_preemptions > 0


def test_more_prompts_than_the_queue_takes(folder: Path) -> None:
    small = {**SETTINGS, "max_num_seqs": 2, "max_num_queued_reqs": 3, "max_num_queued_tokens": 30}
    with LLM(str(folder), **small) as llm:
        results = run(llm, prompts(40), SamplingParams(temperature=0.0, max_tokens=3))
    assert all(len(result.outputs[0].token_ids) == 3 for result in results)


def test_a_failing_request_fails_alone(llm: LLM) -> None:
    forbids_all = SamplingParams(allowed_token_ids=[4], min_tokens=2, stop_token_ids=[4])
    results = run(llm, prompts(3), [GREEDY, forbids_all, GREEDY])
    assert [result.outputs[0].finish_reason for result in results] == ["length", "error", "length"]
    failed = results[1].outputs[0]
    assert failed.error.code == "no_token_left"
    assert tokens(run(llm, prompts(3), GREEDY))[::2] == tokens(results)[::2]


@pytest.mark.parametrize(
    ("prompt", "kind", "message"),
    [
        ([], InvalidRequest, "Prompt 1: It is empty."),
        ([3, VOCAB_SIZE], InvalidRequest, f"Prompt 1: It has token {VOCAB_SIZE}; the vocabulary has tokens 0 to"),
        ([-1], InvalidRequest, "Prompt 1: It has token -1"),
        ([1] * 256, RequestTooLong, "Prompt 1: It has 256 tokens; the context of 256 takes 255 and one output token."),
        ("text", InvalidRequest, "Prompt 1: It is text, but the model has no tokenizer."),
        ([1, 2.5], InvalidRequest, "Prompt 1: It must be text, or a list of token ids"),
        ({"promt": "x"}, InvalidRequest, "Prompt 1: It has the keys ['promt']"),
        ({"prompt": 5}, InvalidRequest, "Prompt 1: Its text is 5."),
    ],
    ids=str,
)
def test_a_wrong_prompt_is_named_before_anything_starts(llm: LLM, prompt: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind) as caught:
        run(llm, [[1, 2], prompt], GREEDY)
    assert caught.value.message.startswith(message)
    assert not llm._engine.core.busy


def test_wrong_parameters_are_named_before_anything_starts(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="There are 2 prompts and 3 sampling_params"):
        run(llm, prompts(2), [GREEDY] * 3)
    with pytest.raises(InvalidRequest, match="There are 2 prompts and 0 sampling_params"):
        run(llm, prompts(2), [])
    with pytest.raises(InvalidRequest, match="Prompts are given as bytes"):
        run(llm, b"abc", GREEDY)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=r"Prompt 0: stop_token_ids names token 160"):
        run(llm, prompts(1), SamplingParams(stop_token_ids=[VOCAB_SIZE]))
    with pytest.raises(InvalidRequest, match="Prompt 0: stop needs a tokenizer"):
        run(llm, prompts(1), SamplingParams(stop=["x"]))
    with pytest.raises(UsageError, match="priority has no effect with scheduling_policy 'fcfs'"):
        run(llm, prompts(1), GREEDY, priority=[1])


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"LLM has no setting 'max_num_seq'. Did you mean max_num_seqs\?"):
        LLM("demo", max_num_seq=4)


def test_a_stop_string_ends_the_text_and_the_request(demo: LLM) -> None:
    [free] = run(demo, "The list is", SamplingParams(temperature=0.0, max_tokens=20))
    text = free.outputs[0].text
    stop = text[len(text) // 2 :][:3]
    [stopped] = run(demo, "The list is", SamplingParams(temperature=0.0, max_tokens=20, stop=stop))
    output = stopped.outputs[0]
    assert output.text == text[: text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert not demo._engine.scheduler.requests


def test_bad_words_do_not_appear(demo: LLM) -> None:
    [free] = run(demo, "The list is", SamplingParams(temperature=0.0, max_tokens=12))
    word = free.outputs[0].text.split()[1]
    [clean] = run(demo, "The list is", SamplingParams(temperature=0.0, max_tokens=12, bad_words=[word]))
    assert word not in clean.outputs[0].text.split()  # a longer word may begin with it: that is another token


def test_chat_uses_the_template(demo: LLM) -> None:
    talk = [{"role": "user", "content": "What is 17 + 25?"}]
    [single] = demo.chat(talk, GREEDY, use_tqdm=False)
    assert single.prompt is not None
    assert "17 + 25" in single.prompt
    assert single.outputs[0].finish_reason == "stop"
    several = demo.chat([talk, talk], GREEDY, use_tqdm=False)
    assert [result.outputs[0].text for result in several] == [single.outputs[0].text] * 2
    with pytest.raises(InvalidRequest, match="messages mixes"):
        demo.chat([talk[0], talk], GREEDY)
    with pytest.raises(InvalidRequest, match="messages are given as str"):
        demo.chat("hello")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="hold what JSON cannot"):
        demo.chat([{"role": "user", "content": object()}])


def test_a_model_without_a_template_says_so(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        llm.chat([{"role": "user", "content": "hello"}])


def test_ctrl_c_aborts_everything_and_the_engine_goes_on(llm: LLM) -> None:
    expected = tokens(run(llm, prompts(3), GREEDY))
    step, seen = llm._engine.core.step, []

    def interrupted() -> list[Any]:
        seen.append(1)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    llm._engine.core.step = interrupted  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            run(llm, prompts(20), SamplingParams(temperature=0.0, max_tokens=200))
    finally:
        llm._engine.core.step = step  # type: ignore[method-assign]
    assert len(seen) < 20
    assert not llm._engine.core.busy
    assert llm._engine.scheduler.kv.usage().num_used == 0
    assert tokens(run(llm, prompts(3), GREEDY)) == expected


def test_progress_goes_to_stderr(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(prompts(2), GREEDY)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2/2" in captured.err


def test_importing_the_package_is_light() -> None:
    code = "import sys, powerband; assert 'torch' not in sys.modules; print(powerband.__version__); powerband.nothing"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "0.1.0\n"
    assert "module 'powerband' has no attribute 'nothing'" in result.stderr


WHOLE: list[dict[str, Any]] = [
    {"repetition_penalty": 2, "presence_penalty": 1, "frequency_penalty": 1},
    {"repetition_penalty": 1, "presence_penalty": -2},
    {"logit_bias": {5: 3, 7: -100}},
    {"temperature": 1, "top_p": 1, "min_p": 1},
    {"temperature": 2, "top_p": 1, "min_p": 0, "frequency_penalty": 2},
]


@pytest.mark.parametrize("whole", WHOLE, ids=str)
def test_whole_numbers_are_the_numbers_that_they_are(llm: LLM, whole: dict[str, Any]) -> None:
    def as_float(value: Any) -> Any:
        return {id: float(bias) for id, bias in value.items()} if isinstance(value, dict) else float(value)

    fixed = {"temperature": 0.0, "max_tokens": 8, "seed": 3}
    floats = {name: as_float(value) for name, value in whole.items()}
    results = [run(llm, prompts(2), SamplingParams(**{**fixed, **given})) for given in (whole, floats)]
    assert tokens(results[0]) == tokens(results[1])
    assert all(len(output.token_ids) == 8 for result in results[0] for output in result.outputs)
