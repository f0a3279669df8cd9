"""Replicas that fail: what a client notices of it, and what does not reach it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from gateways_for_tests import RunningGateway, ScriptedReplica, running_gateway, scripted_replica, text_of, until

from powerband.mock_server.behavior import Behavior, DropBy, words

TEXT = {"model": "scripted", "prompt": "one two three", "max_tokens": 40}
CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 40}
CALM = ("--stream-idle-timeout-s=0.5", "--first-byte-timeout-s=0.5")
REVISIONS = itertools.count(1)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), *CALM) as gateway:
        yield gateway


@contextlib.contextmanager
def replicas(
    gateway: RunningGateway, *scripts: Behavior, engine: str = "powerband", engines: Sequence[str] = ()
) -> Iterator[int]:
    """The gateway serves by scripted replicas, all ready. Yields the number of the last request before.

    engines: of each; else all run `engine`.
    """
    revision = str(next(REVISIONS))
    with contextlib.ExitStack() as stack:
        gateway.replicas = [stack.enter_context(scripted_replica(script)) for script in scripts]
        told = [
            {"id": f"{revision}-{number}", "url": one.url, "model": "scripted", "engine": runs}
            for number, (one, runs) in enumerate(zip(gateway.replicas, engines or [engine] * len(scripts), strict=True))
        ]
        model = {"name": f"scripted-{revision}", "aliases": ["scripted"], "replicas": told}
        gateway.admin.put("/admin/routes", json={"revision": revision, "models": [model]}).raise_for_status()
        until(lambda: set(gateway.replica_states().values()) == {"ready"})
        yield gateway.admin.get("/admin/records").json()["newest"]


def replace_all(gateway: RunningGateway, another: ScriptedReplica) -> None:
    """The same model is served by another replica alone from now on."""
    (model,) = gateway.admin.get("/admin/routes").json()["routes"]["models"]
    route = {"id": "another", "url": another.url, "model": "scripted"}
    made = {"name": model["name"], "aliases": ["scripted"], "replicas": [route]}
    gateway.admin.put("/admin/routes", json={"revision": str(next(REVISIONS)), "models": [made]}).raise_for_status()


def ids_of(events: list[Any]) -> list[int]:
    return [id for one in events[:-1] for choice in one["choices"] for id in choice.get("token_ids", ())]


@pytest.mark.parametrize("how", ["reset", "end", "hang", "garbage", "error"])
def test_a_stream_that_breaks_off_is_continued_by_another_replica(running: RunningGateway, how: DropBy) -> None:
    breaks = Behavior(tpot_s=0.002, drop_every=1, drop_after_chunks=7, drop_by=how)
    with replicas(running, breaks, Behavior()) as before:
        for _ in range(4):
            chat = running.stream("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}})
            text = running.stream("/v1/completions", {**TEXT, "return_token_ids": True})
            assert text_of(chat) == text_of(text) == words(0, 40)
            assert ids_of(text) == list(range(40))
            assert chat[-1] == text[-1] == "[DONE]"
            assert chat[-2]["usage"] == {"prompt_tokens": 3, "completion_tokens": 40, "total_tokens": 43}
            assert len({(one["id"], one["created"], one["model"]) for one in chat[:-1]}) == 1, (
                "one answer, by its looks"
            )
            assert sum(one["choices"] != [] and "role" in one["choices"][0]["delta"] for one in chat[:-1]) == 1
        records = running.records(before)
        assert {one["record"]["outcome"] for one in records} == {"ok"}
        assert {one["record"]["output_tokens"] for one in records} == {40}
        assert sum(one["resumed"] for one in records) >= 1


@pytest.mark.parametrize("how", ["reset", "end", "hang", "garbage"])
def test_a_request_whose_replica_fails_at_once_goes_to_another(running: RunningGateway, how: DropBy) -> None:
    fails = Behavior(drop_every=1, drop_after_chunks=0, drop_by=how)
    with replicas(running, fails, Behavior()) as before:
        for _ in range(4):
            assert text_of(running.stream("/v1/completions", TEXT)) == words(0, 40)
        records = running.records(before)
        assert any(len(one["replicas"]) == 2 for one in records)
        assert {one["status"] for one in records} == {200}


@pytest.mark.parametrize("status", [500, 429])
def test_trouble_at_one_replica_sends_a_request_to_another(running: RunningGateway, status: int) -> None:
    with replicas(running, Behavior(fail_every=1, fail_status=status), Behavior()):
        for stream in (True, False):
            answers = [running.post("/v1/completions", {**TEXT, "stream": stream}) for _ in range(4)]
            assert [answer.status_code for answer in answers] == [200] * 4


def test_whole_answers_are_run_again(running: RunningGateway) -> None:
    with replicas(running, Behavior(drop_every=1, drop_whole=True), Behavior()):
        answers = [running.post("/v1/chat/completions", CHAT) for _ in range(4)]
        assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {words(0, 40)}


def test_a_killed_replica_takes_no_stream_with_it(running: RunningGateway) -> None:
    slow = Behavior(tpot_s=0.01)
    with replicas(running, slow, slow):
        body = {**TEXT, "max_tokens": 150, "stream": True, "return_token_ids": True}
        with (
            running.http.stream("POST", "/v1/completions", json=body) as first,
            running.http.stream("POST", "/v1/completions", json=body) as second,
        ):
            until(lambda: all(replica.truths() for replica in running.replicas))
            running.replicas[0].kill()
            told = [list(answer.iter_lines()) for answer in (first, second)]
        for lines in told:
            data = [line.removeprefix("data: ") for line in lines if line]
            assert data[-1] == "[DONE]"
            ids = [int(line.partition('"token_ids":[')[2].partition("]")[0]) for line in data[:-1]]
            assert ids == list(range(150))


@pytest.mark.parametrize("stream", [True, False])
def test_requests_wait_for_the_next_replica_where_all_were_killed_at_once(
    running: RunningGateway, stream: bool
) -> None:
    with replicas(running, Behavior(), Behavior()) as before:
        for replica in running.replicas:
            replica.kill()
        with ThreadPoolExecutor(24) as threads, scripted_replica() as another:
            asked = [threads.submit(running.post, "/v1/completions", {**TEXT, "stream": stream}) for _ in range(24)]
            until(lambda: running.admin.get("/admin/routes").json()["pools"][0]["queued"] == 24)
            replace_all(running, another)
            assert {one.result().status_code for one in asked} == {200}
        records = running.records(before)
        assert {one["replicas"][-1] for one in records} == {"another"}


def test_streams_of_two_replicas_that_die_at_once_go_on_at_the_next(running: RunningGateway) -> None:
    """Many more than the budget of second attempts allows: the victims of a death are free."""
    slow = Behavior(tpot_s=0.02, slots=100)
    with replicas(running, slow, slow) as before:
        body = {**TEXT, "max_tokens": 150}
        with ThreadPoolExecutor(40) as threads, scripted_replica(Behavior(slots=100)) as another:
            asked = [threads.submit(running.stream, "/v1/completions", body) for _ in range(40)]
            until(lambda: sum(len(replica.truths()) for replica in running.replicas) == 40)
            for replica in running.replicas:
                replica.kill()
            replace_all(running, another)
            assert {text_of(one.result()) for one in asked} == {words(0, 150)}
        assert {one["record"]["outcome"] for one in running.records(before)} == {"ok"}


def test_a_stream_that_breaks_off_at_every_replica_ends_after_ten_failures(running: RunningGateway) -> None:
    breaks = Behavior(drop_every=1, drop_after_chunks=40)
    with replicas(running, breaks, breaks) as before:
        told = running.stream("/v1/completions", {**TEXT, "max_tokens": 1000})
        assert told[-1]["error"]["code"] == "upstream_failed"
        assert text_of(told) == words(0, 400)
        assert len(running.records(before)[-1]["failed"]) == 10


def test_a_stream_that_nobody_can_go_on_with_ends_with_an_error(running: RunningGateway) -> None:
    breaks = Behavior(tpot_s=0.002, drop_every=1, drop_after_chunks=3)
    with replicas(running, breaks) as before:
        told = running.stream("/v1/completions", {**TEXT, "n": 2})
        assert told[-1]["error"]["code"] == "upstream_failed"
        assert "[DONE]" not in told
        record = running.records(before)[-1]
        assert (record["status"], record["record"]["outcome"], record["error"]) == (200, "error", "upstream_failed")
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.APIError, match="replica"):
            list(client.completions.create(model="scripted", prompt="one", n=2, stream=True, max_tokens=40))


def test_an_answer_that_lacks_only_its_last_event_is_whole(running: RunningGateway) -> None:
    with replicas(running, Behavior(drop_every=1, drop_by="no_done")):
        told = running.stream("/v1/completions", {**TEXT, "stream_options": {"include_usage": True}})
        assert text_of(told) == words(0, 40)
        assert told[-2]["usage"]["completion_tokens"] == 40
        assert told[-1] == "[DONE]"


def test_what_is_wrong_with_a_request_is_said_once(running: RunningGateway) -> None:
    with replicas(running, Behavior(), Behavior()) as before:
        answer = running.post("/v1/completions", {**TEXT, "max_tokens": 0})
        assert answer.status_code == 400
        assert "output tokens" in answer.json()["error"]["message"]
        assert sum(len(replica.truths()) for replica in running.replicas) == 1
        assert running.records(before)[-1]["record"]["outcome"] == "refused"


def test_in_front_of_vllm_a_stream_is_continued_as_a_completion(running: RunningGateway) -> None:
    breaks = Behavior(tpot_s=0.002, drop_every=1, drop_after_chunks=7)
    with replicas(running, breaks, Behavior(), engine="vllm") as before:
        for _ in range(4):
            asked = {"stream_options": {"include_usage": True}}
            chat = running.stream("/v1/chat/completions", {**CHAT, **asked})
            text = running.stream("/v1/completions", {**TEXT, **asked})
            assert text_of(chat) == text_of(text) == words(0, 40)
            assert {one["object"] for one in chat[:-1]} == {"chat.completion.chunk"}
            assert chat[-2]["usage"]["completion_tokens"] == text[-2]["usage"]["completion_tokens"] == 40
            assert chat[-2]["usage"]["prompt_tokens"] == 3
        assert sum(one["resumed"] for one in running.records(before)) >= 1


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


@pytest.mark.parametrize(
    "fields",
    [
        *(
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, part]}]}
            for part in (PICTURE, SOUND)
        ),
        {"presence_penalty": 0.5},
        {"guided_choice": ["a", "b"]},
        {"mm_processor_kwargs": {"fps": 2}},
        {"a_field_of_next_year": "on"},
    ],
    ids=["picture", "sound", "presence_penalty", "guided_choice", "mm_processor_kwargs", "unknown field"],
)
def test_in_front_of_vllm_a_stream_that_ids_do_not_carry_on_ends_with_an_error(
    running: RunningGateway, fields: dict[str, Any]
) -> None:
    breaks = Behavior(tpot_s=0.002, drop_every=1, drop_after_chunks=7)
    with replicas(running, breaks, Behavior(), engine="vllm"):
        answers = [running.stream("/v1/chat/completions", {**CHAT, **fields}) for _ in range(4)]
        broken = [told for told in answers if told[-1] != "[DONE]"]
        assert broken, "one of the two replicas breaks off"
        assert all(told[-1]["error"]["code"] == "upstream_failed" for told in broken)


def test_in_front_of_vllm_text_in_parts_and_neutral_values_are_carried_on(running: RunningGateway) -> None:
    breaks = Behavior(tpot_s=0.002, drop_every=1, drop_after_chunks=7)
    message = {"role": "user", "content": [{"type": "text", "text": "what?"}]}
    neutral = {"presence_penalty": 0, "guided_choice": None, "a_field_of_next_year": False, "metadata": {"a": "b"}}
    with replicas(running, breaks, Behavior(), engine="vllm") as before:
        for _ in range(4):
            told = running.stream("/v1/chat/completions", {**CHAT, "messages": [message], **neutral})
            assert text_of(told) == words(0, 40)
        assert sum(one["resumed"] for one in running.records(before)) >= 1


def test_a_stream_goes_on_at_a_replica_of_its_own_engine_among_others(running: RunningGateway) -> None:
    breaks = Behavior(tpot_s=0.002, drop_every=1, drop_after_chunks=7)
    engines = ("powerband", "sglang", "powerband", "sglang")
    with replicas(running, breaks, Behavior(), Behavior(), Behavior(), engines=engines) as before:
        for _ in range(12):
            told = running.stream("/v1/completions", TEXT)
            assert text_of(told) == words(0, 40)
        assert sum(one["resumed"] for one in running.records(before)) >= 1


def test_a_client_that_goes_on_by_itself_gets_a_replica_that_can_or_hears_why_none_can(running: RunningGateway) -> None:
    resumed = {**TEXT, "resume_token_ids": [0, 1, 2]}
    with replicas(running, Behavior(), Behavior(), engines=("sglang", "powerband")):
        for _ in range(6):
            assert text_of(running.stream("/v1/completions", resumed)) == words(3, 40)
    with replicas(running, Behavior(), Behavior(), engine="sglang"):
        answer = running.post("/v1/completions", resumed)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "resume_token_ids")
