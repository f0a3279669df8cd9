"""A stream of vLLM that breaks off at any token goes on at another vLLM as if nothing had happened."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from msgspec import Raw

from powerband.engines.base import BrokenStream, Continuation
from powerband.engines.vllm import VLLM

PROMPT = "Say: "
OUTPUT = "a b ab c abc zz and more"  # what greedy decoding goes on with; a character is a token


class FakeVLLM:
    """vLLM as its stop strings work: they are looked for in what a request generates, not in its prompt."""

    def __init__(self, stop: str, *, includes: bool) -> None:
        self.stop, self.includes = stop, includes

    def generate(self, prompt: str, max_tokens: int) -> str:
        first = len(prompt) - len(PROMPT)
        found = ""
        for character in OUTPUT[first : first + max_tokens]:
            found += character
            if found.endswith(self.stop):
                return found if self.includes else found.removesuffix(self.stop)
        return found

    async def ask(self, _method: str, path: str, body: Mapping[str, Any] | None) -> Mapping[str, Any]:
        assert path == "/detokenize"
        assert body is not None
        return {"prompt": "".join(map(chr, body["tokens"]))}


def continued(fake: FakeVLLM, text: str, max_tokens: int, **fields: Any) -> str:
    """The whole output of a stream of which the client has `text` when its replica dies."""
    asked = {"prompt": PROMPT, "stop": [fake.stop], "include_stop_str_in_output": fake.includes, **fields}
    broken = BrokenStream(
        model="m",
        fields={name: Raw(msgspec.json.encode(value)) for name, value in asked.items()},
        is_chat=False,
        max_tokens=max_tokens,
        prompt_ids=[ord(one) for one in PROMPT],
        token_ids=[ord(one) for one in text],
        text=text,
        has_sent_ids=False,
    )
    assert VLLM.complete_stream is not None
    found: Continuation | None = asyncio.run(VLLM.complete_stream(broken, fake.ask))
    if found is None:
        return text
    ids = found.fields["prompt"]
    rest = fake.generate("".join(map(chr, ids)), found.fields["max_tokens"])
    assert rest.startswith(found.skipped), "what is generated again is what the client has"
    return text + rest.removeprefix(found.skipped)


@pytest.mark.parametrize("stop", ["abc", "c abc zz", "c a"])
def test_a_stop_string_of_which_the_client_has_the_first_half_still_ends_the_answer(stop: str) -> None:
    fake = FakeVLLM(stop, includes=True)
    whole = fake.generate(PROMPT, 100)
    assert whole.endswith(stop)
    for cut in range(1, len(whole)):
        assert continued(fake, whole[:cut], 100) == whole, cut


def test_of_a_stream_that_has_all_its_tokens_nothing_more_is_generated() -> None:
    fake = FakeVLLM("never", includes=False)
    for cut in range(1, 11):
        assert continued(fake, OUTPUT[:cut], 10) == OUTPUT[:10], cut
