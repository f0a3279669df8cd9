"""The default command with a real model: what is streamed is what the engine says when it is asked directly."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from servers_for_tests import RunningServer, running_server

from powerband import LLM, SamplingParams

SETTINGS: dict[str, Any] = {
    "max_model_len": 256,
    "kv_cache_memory": "16MiB",
    "dtype": "float32",
    "threads": 1,
    "max_num_seqs": 4,  # so that some requests wait
}
PROMPTS = ["The function returns", "import os", "A list is", "To open a file", "An error", "For each"]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    flags = [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    with running_server(*flags, command=("-m", "powerband", "serve", "demo", "--port"), timeout_s=90) as running:
        yield running


def test_concurrent_streams_say_what_the_engine_says(server: RunningServer) -> None:
    async def stream(client: openai.AsyncOpenAI, prompt: str) -> str:
        chunks = await client.completions.create(
            model="demo", prompt=prompt, max_tokens=24, temperature=0, stream=True, stop=["\n\n\n"]
        )
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def all_streams() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(stream(client, prompt) for prompt in PROMPTS))

    with LLM("demo", **SETTINGS) as llm:
        params = SamplingParams(temperature=0, max_tokens=24, stop=["\n\n\n"])
        expected = [result.outputs[0].text for result in llm.generate(PROMPTS, params, use_tqdm=False)]
    assert asyncio.run(all_streams()) == expected


def test_a_seed_repeats_itself_and_copies_differ(server: RunningServer) -> None:
    body = {"prompt": "The", "max_tokens": 12, "temperature": 1.0, "seed": 7, "n": 3}
    first, second = ([c["text"] for c in server.post("/v1/completions", **body).json()["choices"]] for _ in range(2))
    assert first == second
    assert len(set(first)) > 1


def test_the_prompt_is_scored_as_it_would_be_generated(server: RunningServer) -> None:
    body = {"prompt": "The function returns", "temperature": 0, "logprobs": 2}
    made = server.post("/v1/completions", **body, max_tokens=6, return_token_ids=True).json()["choices"][0]
    whole = made["prompt_token_ids"] + made["token_ids"]
    scored = server.post("/v1/completions", **body | {"prompt": whole}, max_tokens=0, echo=True).json()["choices"][0]
    assert scored["logprobs"]["token_logprobs"][-6:] == pytest.approx(made["logprobs"]["token_logprobs"], abs=1e-4)
    assert scored["text"] == body["prompt"] + made["text"]


def test_everything_is_given_back(server: RunningServer) -> None:
    server.until(lambda: server.figure("powerband_kv_cache_usage_ratio") == 0)
    assert server.figure("vllm:generation_tokens_total") > 100
    assert server.figure("vllm:iteration_tokens_total_count") > 24


class Point(pydantic.BaseModel):
    x: int = pydantic.Field(ge=0, le=99)
    y: int = pydantic.Field(ge=0, le=99)
    name: Literal["here", "there"]


HI: Any = [{"role": "user", "content": "Where?"}]


def test_the_official_client_parses_answers_of_a_form(server: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        chat = client.chat.completions.parse(model="demo", messages=HI, response_format=Point, temperature=2, seed=1)
        assert isinstance(chat.choices[0].message.parsed, Point)
        answer = client.responses.parse(model="demo", input=HI, text_format=Point)
        assert isinstance(answer.output_parsed, Point)
        with client.chat.completions.stream(model="demo", messages=HI, response_format=Point) as stream:
            assert isinstance(stream.get_final_completion().choices[0].message.parsed, Point)


def test_every_way_to_ask_for_a_form_is_followed(server: RunningServer) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    wrapped = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}

    def chat(**form: Any) -> str:
        body = {"messages": HI, "max_tokens": 100, "temperature": 2, "seed": 5, **form}
        text: str = server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]["content"]
        return text

    for form in ({"response_format": wrapped}, {"structured_outputs": {"json": schema}}):
        jsonschema.validate(json.loads(chat(**form)), schema)
    assert chat(structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
    assert re.fullmatch("[ab]{3}", chat(structured_outputs={"regex": "[ab]{3}"}))
    assert chat(structured_outputs={"grammar": 'root ::= "x" | "y"'}) in ("x", "y")
    assert chat(response_format={"type": "json_object"}, logit_bias={"93": -100}, max_tokens=8).startswith("{")
    made = server.post("/v1/completions", prompt=["a", "b"], n=2, structured_outputs={"regex": "[ab]{3}"}).json()
    assert all(re.fullmatch("[ab]{3}", choice["text"]) for choice in made["choices"])


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (
            "/v1/chat/completions",
            {
                "messages": HI,
                "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}},
            },
            "response_format.json_schema.schema.not",
        ),
        (
            "/v1/responses",
            {"input": "x", "text": {"format": {"type": "json_schema", "name": "n", "schema": {"not": {}}}}},
            "text.format.schema.not",
        ),
        (
            "/v1/completions",
            {"prompt": "x", "structured_outputs": {"json": {"not": {}}}},
            "structured_outputs.json.not",
        ),
        (
            "/v1/completions",
            {"prompt": "x", "structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs",
        ),
        ("/v1/completions", {"prompt": "x", "response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
def test_a_form_that_cannot_be_followed_is_a_400_that_names_the_place(
    server: RunningServer, path: str, body: dict[str, Any], param: str
) -> None:
    answer = server.post(path, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("n", [2, 7])  # there are four seats: some choices wait
def test_the_choices_of_a_prompt_compute_it_once(server: RunningServer, n: int) -> None:
    names = [f"powerband_prefix_cache_{what}_total" for what in ("queries", "hits")]
    before = [server.settled(name) for name in names]
    prompt = [300 + 7 * n + place for place in range(100)]
    answer = server.post("/v1/completions", prompt=prompt, max_tokens=3, n=n, temperature=1.0)
    assert len(answer.json()["choices"]) == n
    server.until(lambda: server.figure(names[0]) > before[0])
    queries, hits = (server.settled(name) - known for name, known in zip(names, before, strict=True))
    assert (queries, hits) == (100 * n, 96 * (n - 1))  # all but the last block of sixteen
    assert answer.json()["usage"]["prompt_tokens"] == 100


def test_the_answers_of_a_prompt_in_python_compute_it_once() -> None:
    with LLM("demo", **SETTINGS) as llm:
        core, steps = llm._engine.core, []
        schedule = core.scheduler.schedule
        core.scheduler.schedule = lambda now: steps.append(schedule(now)) or steps[-1]  # type: ignore[method-assign]
        llm.generate([list(range(300, 400))], SamplingParams(n=4, max_tokens=2, temperature=1.0), use_tqdm=False)
    prefilled = sum(work.num_tokens for step in steps if step is not None for work in step.works if work.start < 100)
    assert prefilled == 100 + 3 * 4
