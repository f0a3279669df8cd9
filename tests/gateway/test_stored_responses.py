"""previous_response_id and stored responses, by OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import vllm_replica
from gateways_for_tests import RunningGateway, running_gateway, until
from pass_through_gateway import client_of, new_key, serving

from powerband.gateway.accounts.responses import _redacted

ASKED: dict[str, Any] = {"model": "public", "input": "How is the weather?"}
TOOL: Any = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), "--store-content") as running:
        yield running
        assert "Traceback" not in (running.database.parent / "gateway.log").read_text()


def items_of(sent: dict[str, Any]) -> list[Any]:
    """What a replica was sent, in short: texts, and the types of other items."""
    assert "previous_response_id" not in sent
    assert sent["store"] is False
    return [
        content if isinstance(content := item.get("content"), str) else content[0]["text"] if content else item["type"]
        for item in sent["input"]
    ]


def code_of(call: Any) -> str:
    with pytest.raises(openai.APIStatusError) as refused:
        call()
    assert isinstance(refused.value.code, str)
    return refused.value.code


def test_a_conversation_goes_on_with_only_what_is_new(gateway: RunningGateway) -> None:
    with serving(gateway) as (replica,):
        client = client_of(gateway)
        first = client.responses.create(**ASKED, instructions="Be brief.")
        second = client.responses.create(model="public", input="And then?", previous_response_id=first.id)
        third = client.responses.create(
            model="public", input=[{"role": "user", "content": "Sure?"}], previous_response_id=second.id
        )
        assert third.previous_response_id == second.id != first.id
        said = ["hm", vllm_replica.TEXT]
        assert items_of(replica.posts[1]) == [ASKED["input"], *said, "And then?"]
        assert items_of(replica.posts[2]) == [ASKED["input"], *said, "And then?", *said, "Sure?"]
        assert "instructions" not in replica.posts[1]  # as OpenAI has it
        assert (first.to_dict()["store"], first.previous_response_id) == (True, None)


def test_a_stream_is_stored_and_continued(gateway: RunningGateway) -> None:
    with serving(gateway) as (replica,):
        client = client_of(gateway)
        with client.responses.stream(**ASKED) as stream:
            events = list(stream)
            final = stream.get_final_response()
        assert {event.response.id for event in events if event.type in ("response.created", "response.completed")} == {
            final.id
        }
        assert client.responses.retrieve(final.id).output_text == vllm_replica.TEXT
        with client.responses.stream(model="public", input="And?", previous_response_id=final.id) as stream:
            assert stream.get_final_response().previous_response_id == final.id
        assert items_of(replica.posts[-1]) == [ASKED["input"], "hm", vllm_replica.TEXT, "And?"]


def test_calls_of_tools_are_continued_by_their_results(gateway: RunningGateway) -> None:
    with serving(gateway) as (replica,):
        client = client_of(gateway)
        first = client.responses.create(**ASKED, tools=[TOOL])
        call = next(item for item in first.output if item.type == "function_call")
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
        client.responses.create(model="public", input=[result], previous_response_id=first.id, tools=[TOOL])
        sent = replica.posts[-1]["input"]
        assert [item.get("type") for item in sent] == [None, "reasoning", "function_call", "function_call_output"]
        assert (sent[2]["call_id"], sent[2]["arguments"]) == (call.call_id, vllm_replica.CALL["arguments"])


def test_a_response_is_retrieved_listed_and_deleted(gateway: RunningGateway) -> None:
    with serving(gateway):
        client = client_of(gateway)
        sent: Any = [{"role": "user", "content": "one"}, {"role": "user", "content": "two", "id": "msg_mine"}]
        made = client.responses.create(model="public", input=sent)
        assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
        listed = client.responses.input_items.list(made.id, order="asc")
        assert [(item.type, item.content[0].text) for item in listed] == [("message", "one"), ("message", "two")]  # type: ignore[union-attr]
        assert listed.data[1].id == "msg_mine"
        pages = client.responses.input_items.list(made.id, limit=1)  # the latest first, page by page
        assert [item.content[0].text for item in pages] == ["two", "one"]  # type: ignore[union-attr]
        client.responses.delete(made.id)
        assert code_of(lambda: client.responses.retrieve(made.id)) == "response_not_found"
        assert code_of(lambda: client.responses.delete(made.id)) == "response_not_found"
        again = lambda: client.responses.create(**ASKED, previous_response_id=made.id)  # noqa: E731
        assert code_of(again) == "previous_response_not_found"


def test_a_conversation_whose_beginning_was_deleted_says_so(gateway: RunningGateway) -> None:
    with serving(gateway):
        client = client_of(gateway)
        first = client.responses.create(**ASKED)
        second = client.responses.create(**ASKED, previous_response_id=first.id)
        client.responses.delete(first.id)
        with pytest.raises(openai.BadRequestError, match=f"continues '{first.id}', which was deleted"):
            client.responses.create(**ASKED, previous_response_id=second.id)


def test_nothing_is_stored_with_store_false(gateway: RunningGateway) -> None:
    with serving(gateway) as (replica,):
        key, secret = new_key(gateway)
        client = client_of(gateway, secret)
        first = client.responses.create(**ASKED)
        private = client.responses.create(
            model="public", input="in private", store=False, previous_response_id=first.id
        )
        assert items_of(replica.posts[-1])[-1] == "in private"
        assert (private.to_dict()["store"], private.id) == (False, "resp_1")
        assert code_of(lambda: client.responses.retrieve(private.id)) == "response_not_found"
        until(lambda: len(gateway.admin.get(f"/admin/content?key={key}").json()["data"]) == 1)
        files = [file.read_bytes() for file in gateway.database.parent.glob("gateway.db*")]
        assert not any(b"in private" in data for data in files)


def test_only_the_key_that_made_a_response_finds_it(gateway: RunningGateway) -> None:
    with serving(gateway):
        (_, mine), (_, other) = new_key(gateway), new_key(gateway)
        made = client_of(gateway, mine).responses.create(**ASKED)
        for client in (client_of(gateway, other), client_of(gateway)):
            assert code_of(lambda client=client: client.responses.retrieve(made.id)) == "response_not_found"
            assert code_of(lambda client=client: client.responses.delete(made.id)) == "response_not_found"
            assert code_of(lambda client=client: client.responses.input_items.list(made.id)) == "response_not_found"
            again = lambda client=client: client.responses.create(**ASKED, previous_response_id=made.id)  # noqa: E731
            assert code_of(again) == "previous_response_not_found"
        assert client_of(gateway, mine).responses.retrieve(made.id).id == made.id


def test_what_is_stored_of_a_key_is_erased(gateway: RunningGateway) -> None:
    with serving(gateway):
        key, secret = new_key(gateway)
        client = client_of(gateway, secret)
        made = client.responses.create(model="public", input="the-unforgettable-phrase")
        assert client.responses.retrieve(made.id)
        gateway.admin.delete(f"/admin/content?key={key}").raise_for_status()
        assert code_of(lambda: client.responses.retrieve(made.id)) == "response_not_found"
        files = [file.read_bytes() for file in gateway.database.parent.glob("gateway.db*")]
        assert not any(b"the-unforgettable-phrase" in data for data in files)


@pytest.mark.parametrize("arguments", [(), ("--no-redact-content",)])
def test_a_conversation_with_redactions_is_refused_rather_than_changed(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    with (
        running_gateway(tmp_path, "--store-content", *arguments) as gateway,
        serving(gateway) as (replica,),
    ):
        client = client_of(gateway)
        harmless = client.responses.create(**ASKED)
        made = client.responses.create(
            model="public",
            input=[
                {"type": "function_call_output", "call_id": "call_1", "output": '{"mail": "jane\\u0040example.com"}'}
            ],
            previous_response_id=harmless.id,
        )
        goes_on = lambda: client.responses.create(**ASKED, previous_response_id=made.id)  # noqa: E731
        [item] = client.responses.input_items.list(made.id)
        on_disk = b"".join(file.read_bytes() for file in tmp_path.glob("gateway.db*"))
        if arguments:
            assert goes_on().output_text == vllm_replica.TEXT
            assert json.loads(replica.posts[-1]["input"][3]["output"]) == {"mail": "jane@example.com"}
        else:
            assert code_of(goes_on) == "previous_response_redacted"
            assert json.loads(item.output) == {"mail": "[e-mail]"}  # type: ignore[union-attr,arg-type]
            assert b"jane" not in on_disk


def test_a_failed_response_is_not_stored_and_failover_keeps_the_id(gateway: RunningGateway) -> None:
    def dies(path: str, body: dict[str, Any]) -> bytes:
        return vllm_replica.CHUNKED + b"".join(vllm_replica.as_frames(vllm_replica.response_events(body)[:3]))

    with serving(gateway, dies, vllm_replica.respond) as replicas:
        client = client_of(gateway)
        for _ in range(4):
            with client.responses.stream(**ASKED) as stream:
                made = stream.get_final_response()
            assert client.responses.retrieve(made.id).output_text == vllm_replica.TEXT
        assert replicas[0].posts


def test_without_a_store_the_hint_says_what_to_do(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as gateway, serving(gateway):
        client = client_of(gateway)
        with pytest.raises(openai.BadRequestError, match=r"whole conversation in 'input'.*--store-content"):
            client.responses.create(**ASKED, previous_response_id="resp_1")
        assert client.responses.create(**ASKED, store=True).to_dict()["store"] is False
        assert code_of(lambda: client.responses.retrieve("resp_1")) == "responses_not_stored"


@pytest.mark.parametrize(
    ("query", "param"),
    [({"limit": 0}, "limit"), ({"limit": "x"}, "limit"), ({"order": "up"}, "order"), ({"after": "gone"}, "after")],
)
def test_a_wrong_page_of_items_is_named(gateway: RunningGateway, query: dict[str, Any], param: str) -> None:
    with serving(gateway):
        made = client_of(gateway).responses.create(**ASKED)
        answer = gateway.http.get(f"/v1/responses/{made.id}/input_items", params=query)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("wrong", [{"input": None}, {"input": 5}, {"previous_response_id": 5}])
def test_a_wrong_request_is_named(gateway: RunningGateway, wrong: dict[str, Any]) -> None:
    with serving(gateway):
        made = client_of(gateway).responses.create(**ASKED)
        answer = gateway.post("/v1/responses", {**ASKED, "previous_response_id": made.id, **wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(wrong)))


def test_a_conversation_ends_at_the_largest_body(tmp_path: Path) -> None:
    with running_gateway(tmp_path, "--store-content", "--max-body-bytes=5000") as gateway, serving(gateway):
        client = client_of(gateway)
        asked: dict[str, Any] = {"model": "public", "input": "word " * 400}
        first = client.responses.create(**asked)
        second = client.responses.create(**asked, previous_response_id=first.id)
        with pytest.raises(openai.BadRequestError, match="larger than 5000 bytes"):
            client.responses.create(**asked, previous_response_id=second.id)


@pytest.mark.parametrize(
    "item",
    [
        {"role": "user", "content": "I am jane@example.com"},
        {"role": "user", "name": "jane@example.com", "content": "hi"},
        {"role": "user", "id": "jane@example.com", "content": "hi"},
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"name": "jane\\u0040example.com"}'},
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"jane\\u0040example.com": 1}'},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "jane@example.com"}]},
    ],
)
def test_personal_data_is_redacted_wherever_it_stands(item: dict[str, Any]) -> None:
    *_, is_redacted, sent, _ = redacted_row(json.dumps([item]).encode(), b'{"output": []}')
    assert is_redacted
    assert b"jane" not in sent
    *_, is_redacted, sent, response = redacted_row(b"[]", json.dumps({"output": [item]}).encode())
    assert is_redacted
    assert b"jane" not in response


def test_other_fields_of_a_response_are_redacted_but_do_not_end_its_conversation() -> None:
    response = {"metadata": {"jane@example.com": "x"}, "instructions": "I am jane@example.com", "output": []}
    *_, is_redacted, _, stored = redacted_row(b"[]", json.dumps(response).encode())
    assert not is_redacted
    assert b"jane" not in stored


def test_ids_that_look_like_the_number_of_a_card_stay() -> None:
    item = {"type": "function_call", "call_id": "call_4111111111111111", "name": "f", "arguments": "{}"}
    *_, is_redacted, sent, _ = redacted_row(json.dumps([item]).encode(), b'{"output": []}')
    assert (is_redacted, json.loads(sent)) == (0, [item])


def redacted_row(sent: bytes, response: bytes) -> Any:
    return _redacted(("resp_1", 0.0, "key_1", "req_1", None, 0, sent, response))
