"""The official client against a server that repeats prompts: `python openai_client_check.py URL`, in any version.

Also run by test_openai_client.py, with the version that is installed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import openai

MESSAGES: Any = [{"role": "user", "content": "hi there"}]
ANSWER = "user\nhi there"


def check_sync(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    chat = client.chat.completions.create(model=model.id, messages=MESSAGES)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == (ANSWER, "stop")
    assert chat.usage
    assert chat.usage.prompt_tokens_details
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
    # What came back can be sent back.
    follow: Any = [*MESSAGES, chat.choices[0].message, {"role": "user", "content": "go on"}]
    assert client.chat.completions.create(model=model.id, messages=follow).choices[0].message.content == ANSWER
    text = client.completions.create(model=model.id, prompt=["one two", "three"], max_tokens=2, n=2, logprobs=1)
    assert [choice.index for choice in text.choices] == [0, 1, 2, 3]
    assert text.choices[0].logprobs
    assert text.choices[0].logprobs.text_offset == [0, 3]
    scored = client.chat.completions.create(
        model=model.id, messages=MESSAGES, logprobs=True, top_logprobs=3, max_completion_tokens=4
    )
    assert scored.choices[0].logprobs
    assert scored.choices[0].logprobs.content
    assert len(scored.choices[0].logprobs.content[0].top_logprobs) == 3


def check_streams(client: openai.OpenAI, model: str) -> None:
    text, finish, usage = "", [], None
    for chunk in client.chat.completions.create(
        model=model, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish += [choice.finish_reason] if choice.finish_reason else []
    assert (text, finish) == (ANSWER, ["stop"])
    assert usage
    assert usage.completion_tokens > 0
    parts = client.completions.create(model=model, prompt="one two three", max_tokens=3, stream=True)
    assert "".join(part.choices[0].text for part in parts) == "one two three"
    with client.chat.completions.stream(model=model, messages=MESSAGES) as stream:
        assert stream.get_final_completion().choices[0].message.content == ANSWER
    early = client.chat.completions.create(model=model, messages=MESSAGES, stream=True, max_tokens=400)
    next(iter(early))
    early.close()


def check_errors(client: openai.OpenAI, model: str) -> None:
    cases: list[tuple[type[openai.APIStatusError], str | None, dict[str, Any]]] = [
        (openai.BadRequestError, "messages", {"messages": []}),
        (openai.BadRequestError, "temperature", {"temperature": -1}),
        (openai.BadRequestError, "temprature", {"extra_body": {"temprature": 1}}),
        (openai.NotFoundError, "model", {"model": "gpt-9"}),
    ]
    for kind, param, fields in cases:
        arguments: dict[str, Any] = {"model": model, "messages": MESSAGES} | fields
        error = refusal(lambda arguments=arguments: client.chat.completions.create(**arguments))
        assert isinstance(error, kind)
        assert error.param == param
        assert error.request_id
    too_long = refusal(lambda: client.completions.create(model=model, prompt="a " * 2000))
    assert isinstance(too_long, openai.BadRequestError)
    assert too_long.code == "context_length_exceeded"


def refusal(call: Callable[[], Any]) -> openai.APIStatusError:
    try:
        call()
    except openai.APIStatusError as error:
        return error
    raise AssertionError("this was taken")


async def check_async(url: str, model: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

        async def one(i: int) -> str:
            stream = await client.completions.create(model=model, prompt=f"number {i}", max_tokens=2, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*(one(i) for i in range(20)))
        assert all("number".startswith(text[:6].strip()) for text in texts), texts
        chat = await client.chat.completions.create(model=model, messages=MESSAGES)
        assert chat.choices[0].message.content == ANSWER


def check(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        check_sync(client)
        check_streams(client, model)
        check_errors(client, model)
    asyncio.run(check_async(url, model))


if __name__ == "__main__":
    check(sys.argv[1])
    sys.stdout.write(f"openai {openai.__version__}: all as it should be\n")
