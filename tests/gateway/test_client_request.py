"""What a replica is sent for a client's body."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from powerband.errors import InvalidRequest
from powerband.gateway.proxy.client_request import MAX_PROMPTS, ClientRequest
from powerband.gateway.proxy.stream_state import StreamState
from powerband.gateway.request import ANONYMOUS, Endpoint, GatewayRequest
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.client import UpstreamClient
from powerband.gateway.upstream.context_lengths import ContextLengths
from powerband.spec.deployment import EngineName
from virtual_loop import VirtualLoop, virtually

BODY = {"model": "demo", "prompt": "hello", "seed": 7, "an_extra": {"deep": [1.50, None]}}


def sent(body: dict[str, Any], tenant: str = ANONYMOUS, engine: EngineName = "powerband") -> dict[str, Any]:
    replica = ReplicaAddress(id="r1", url="http://127.0.0.1:1", model="demo", engine=engine)
    found: dict[str, Any] = json.loads(
        ClientRequest(json.dumps(body).encode(), "completions").upstream_body(replica, tenant)
    )
    return found


def test_what_needs_no_change_is_passed_on_as_it_came() -> None:
    data = json.dumps(BODY, indent=3).encode()
    replica = ReplicaAddress(id="r1", url="http://127.0.0.1:1", model="demo")
    assert ClientRequest(data, "completions").upstream_body(replica, ANONYMOUS) == data


@pytest.mark.parametrize(("engine", "name"), [("powerband", "user"), ("vllm", "cache_salt")])
def test_keys_share_no_cached_prefix(engine: EngineName, name: str) -> None:
    said = {sent(body, tenant, engine)[name] for body in (BODY, {**BODY, name: "me"}) for tenant in ("key_a", "key_b")}
    assert said == {"key_a", "key_b", "key_a/me", "key_b/me"}
    assert sent({**BODY, name: "key_a"}, engine=engine)[name] == "anonymous/key_a"
    assert len(sent({**BODY, name: "x" * 512}, "key_a", engine)[name]) == (70 if name == "user" else 518)


@pytest.mark.parametrize("name", ["user", "cache_salt"])
def test_long_labels_stay_distinct_and_longer_ones_are_refused(name: str) -> None:
    engine: EngineName = "powerband" if name == "user" else "vllm"
    first, second = (sent({**BODY, name: "x" * 511 + end}, "key_a", engine)[name] for end in "ab")
    assert first != second
    with pytest.raises(InvalidRequest, match=name):
        sent({**BODY, name: "x" * 513}, "key_a", engine)


@pytest.mark.parametrize("name", ["Max_Tokens", "MODEL", "N", "ſtream", "max_toKens", "Max_Completion_Tokens"])
def test_a_field_in_another_case_is_refused_because_some_servers_would_read_it(name: str) -> None:
    with pytest.raises(InvalidRequest, match="Unknown field") as refused:
        sent({**BODY, name: 100_000})
    assert refused.value.param == name
    assert name.casefold() in str(refused.value.hint)


def test_a_stream_is_asked_for_what_going_on_elsewhere_needs() -> None:
    body = sent({**BODY, "stream": True})
    assert body["return_token_ids"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["an_extra"] == BODY["an_extra"]


def test_a_replica_that_goes_on_is_told_what_the_client_has() -> None:
    replica = ReplicaAddress(id="r1", url="http://127.0.0.1:1", model="demo")
    client_request = ClientRequest(json.dumps({**BODY, "stream": True, "echo": True}).encode(), "completions")
    body = json.loads(client_request.upstream_body(replica, ANONYMOUS, [3, 1, 4]))
    assert body["resume_token_ids"] == [3, 1, 4]
    assert "echo" not in body, "the prompt was echoed by the replica before"


def told(data: bytes, endpoint: Endpoint = "chat") -> GatewayRequest:
    return ClientRequest(data, endpoint).request("req_1", "demo", ANONYMOUS, {}, 256)


@pytest.mark.parametrize("asked", [-(2**31), -1, 0, 5])
def test_without_a_key_nobody_goes_before_those_who_have_one(asked: int) -> None:
    assert told(json.dumps({"messages": [], "priority": asked}).encode()).priority == max(asked, 0)


@pytest.mark.parametrize(
    "text", ["plain words", "漢字" * 20, "🙂" * 20, "\x01" * 20, '\\u0041"' * 20, "\\\\u" * 20, "\\漢" * 20]
)
def test_a_prompt_has_no_more_tokens_than_bytes_however_it_is_written(text: str) -> None:
    """A byte-level vocabulary needs a byte for each token; escapes do not make it more."""
    sizes = []
    for ensure_ascii in (True, False):
        body = json.dumps({"prompt": text}, ensure_ascii=ensure_ascii).encode()
        sizes.append(told(body, "completions").max_prompt_tokens or 0)
        assert sizes[-1] >= len(text.encode())
    assert abs(sizes[0] - sizes[1]) < 10 or sizes[0] < 7 * len(text)


def test_what_names_no_limit_says_so() -> None:
    assert told(b'{"messages":[]}').is_open_ended
    assert not told(b'{"messages":[],"max_completion_tokens":9}').is_open_ended
    completion = told(b'{"prompt":"a","n":2}', "completions")
    assert (completion.is_open_ended, completion.max_output_tokens) == (False, 32)


def test_a_cap_is_sent_where_the_client_named_none() -> None:
    replica = ReplicaAddress(id="r1", url="http://127.0.0.1:1", model="demo")
    for named, wanted in (({}, 90), ({"max_tokens": 7}, 7)):
        client_request = ClientRequest(json.dumps({"messages": [], **named}).encode(), "chat")
        client_request.cap = 90
        assert json.loads(client_request.upstream_body(replica, ANONYMOUS))["max_tokens"] == wanted
        assert client_request.limit == wanted


MIXED = ('[1,2,"a"]', '["a",1]', "[1,[2]]", '[["a"]]')


@pytest.mark.parametrize("prompt", MIXED)
def test_a_prompt_that_mixes_texts_ids_and_lists_is_refused(prompt: str) -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        told(b'{"prompt":%b}' % prompt.encode(), "completions")


@pytest.mark.parametrize(
    ("prompt", "number"),
    [('["a","b"]', 2), ('["a\\"b", "[,]"]', 2), ("[1,2,3]", 1), ("[[1,2],[3]]", 2), ("[]", 1), ('"a"', 1)],
)
def test_prompts_are_counted(prompt: str, number: int) -> None:
    assert ClientRequest(b'{"prompt":%b}' % prompt.encode(), "completions").num_prompts == number


@pytest.mark.parametrize("item", ['"a"', "[1]"])
def test_a_request_has_at_most_so_many_prompts(item: str) -> None:
    def body(number: int) -> bytes:
        return f'{{"prompt":[{",".join([item] * number)}]}}'.encode()

    assert ClientRequest(body(MAX_PROMPTS), "completions").num_prompts == MAX_PROMPTS
    with pytest.raises(InvalidRequest, match="several requests"):
        ClientRequest(body(MAX_PROMPTS + 1), "completions")


def test_what_an_engine_computes_beside_a_prompt_of_ids_is_counted() -> None:
    suffix = "x" * 5000
    for more in ({"suffix": suffix}, {"a_field_of_next_year": suffix}):
        assert told(json.dumps({"prompt": [1, 2], **more}).encode(), "completions").max_prompt_tokens >= 5000
    bias = {"logit_bias": {str(id): 1 for id in range(1000)}}
    assert told(json.dumps({"prompt": [1, 2], **bias}).encode(), "completions").max_prompt_tokens == 2


def test_embeddings_are_no_prompt() -> None:
    with pytest.raises(InvalidRequest, match="prompt_embeds"):
        told(b'{"prompt":"a","prompt_embeds":["AAAA"]}', "completions")


def test_blanks_that_pad_a_body_are_not_kept() -> None:
    data = b'{"model": "m", "prompt": "two  blanks", "x": [1, "\\u00e9"]' + b" " * 100_000 + b"}"
    found = ClientRequest(data, "completions")
    assert found.size < 100
    body = found.upstream_body(ReplicaAddress(id="r", url="http://r:1", model="m", engine="vllm"), ANONYMOUS)
    assert json.loads(body) == json.loads(data)


def test_a_replica_with_a_short_context_does_not_cut_the_answers_of_others() -> None:
    replicas = [ReplicaAddress(id=f"r{i}", url=f"http://r{i}:1", model="m", engine="vllm") for i in range(3)]
    lengths = ContextLengths()
    lengths.known = {"r0": 1, "r1": 8192, "r2": 200}

    assert asyncio.run(lengths.largest(replicas, UpstreamClient())) == 8192
    found = ClientRequest(b'{"model": "m", "messages": [{"role": "user", "content": "a question"}]}', "chat")
    found.cap, found.contexts = 4000, lengths.known
    caps = [json.loads(found.upstream_body(replica, ANONYMOUS))["max_tokens"] for replica in replicas]
    assert caps[:2] == [4000, 4000], "where not even the prompt has room, the replica judges"
    assert 100 < caps[2] < 200


def test_places_in_a_resumed_text_go_on_where_the_first_part_ended() -> None:
    """vLLM counts the second part's from its own first character."""
    asked = ClientRequest(b'{"model": "m", "prompt": "a", "logprobs": 1, "stream": true}', "completions")
    state = StreamState(asked, "m")
    state.begin(ReplicaAddress(id="r", url="http://r:1", model="m", engine="vllm"))
    places: list[int] = []

    def tell(text: str, offset: int, token: int) -> None:
        logprobs = {"tokens": [text], "token_logprobs": [-1.0], "text_offset": [offset]}
        choice = {"index": 0, "text": text, "logprobs": logprobs, "token_ids": [token]}
        shown = state.process_event(json.dumps({"model": "m", "choices": [choice]}).encode(), 0.0)
        places.extend(json.loads(shown.removeprefix(b"data: "))["choices"][0]["logprobs"]["text_offset"])

    tell("ab", 0, 1)
    tell("cde", 2, 2)
    for kept in (2, 3):
        state.resume(kept=kept, counts_as_prompt=True)
        tell("x", 0, kept + 1)
    assert places == [0, 2, 5, 6]


class Replicas(UpstreamClient):
    """Replicas that answer GET /v1/models with a status and a context length, or never."""

    def __init__(self, pages: dict[str, tuple[int, int] | None]) -> None:
        super().__init__()
        self.pages = pages
        self.asked: list[str] = []

    async def ask(
        self, replica: ReplicaAddress, method: str, path: str, body: bytes, timeout_s: float
    ) -> tuple[int, bytes]:
        self.asked.append(replica.id)
        page = self.pages[replica.id]
        if page is None:
            await asyncio.sleep(0.05)
            raise TimeoutError
        status, length = page
        return status, json.dumps({"data": [{"id": "m", "max_model_len": length}]}).encode()


def test_a_replica_that_hangs_or_still_loads_is_asked_again_while_nobody_waits() -> None:
    replicas = [ReplicaAddress(id=f"r{i}", url=f"http://r{i}:1", model="m", engine="vllm") for i in range(3)]
    upstream = Replicas({"r0": (200, 4096), "r1": None, "r2": (503, 0)})

    async def run(_: VirtualLoop) -> None:
        lengths = ContextLengths()
        assert await lengths.largest(replicas, upstream) == 4096
        waiting = lengths.largest(replicas, upstream)
        assert await asyncio.wait_for(waiting, 0.04) == 4096, "r1 would take longer"
        upstream.pages["r2"] = (200, 8192)
        await asyncio.sleep(0.06)
        await lengths.largest(replicas, upstream)
        await asyncio.sleep(0.06)
        assert await lengths.largest(replicas, upstream) == 8192
        assert upstream.asked.count("r0") == 1

    virtually(run)
