"""Prompts and outputs: kept only if asked for, redacted before the disk, gone when their time is over or on demand."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
from gateways_for_tests import gateway_before, text_of, until

from powerband.gateway.accounts import transcripts
from powerband.gateway.accounts.accounts import Accounts
from powerband.gateway.accounts.transcripts import MAX_CHARS, prompt_text, stored
from powerband.gateway.options import RetentionOptions
from powerband.gateway.request import GatewayRequest
from powerband.mock_server.behavior import Behavior

SECRET = "the-unforgettable-phrase"


def request(id: str, tenant: str = "key_1") -> GatewayRequest:
    return GatewayRequest(id=id, endpoint="chat", model="demo", tenant=tenant)


def note(accounts: Accounts, id: str, prompt: str, output: str, tenant: str = "key_1") -> None:
    accounts.content.note(request(id, tenant), msgspec.json.encode(prompt), [output])


def on_disk(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.parent.iterdir())


def kept(accounts: Accounts, key_id: str = "key_1") -> list[tuple[str, str]]:
    accounts.store.flush().result(10)
    found = accounts.store.read(lambda connection: stored(connection, key_id, 100))
    return [(row["prompt"], row["output"]) for row in found]


def test_nothing_is_kept_by_default(tmp_path: Path) -> None:
    accounts = Accounts.open(tmp_path / "gateway.db")
    note(accounts, "r1", SECRET, SECRET)
    assert kept(accounts) == []
    accounts.close()
    assert SECRET.encode() not in on_disk(accounts.store.path)


def test_what_is_kept_is_redacted_before_it_reaches_the_disk(tmp_path: Path) -> None:
    accounts = Accounts.open(tmp_path / "gateway.db", RetentionOptions(store_content=True))
    note(accounts, "r1", "I am jane@example.com", "Call +49 30 1234567")
    assert kept(accounts) == [("I am [e-mail]", "Call [phone]")]
    assert b"jane@example.com" not in on_disk(accounts.store.path)
    accounts.close()


def test_long_texts_are_cut_where_nothing_is_cut_in_half(tmp_path: Path) -> None:
    accounts = Accounts.open(tmp_path / "gateway.db", RetentionOptions(store_content=True))
    filler = "word " * (MAX_CHARS // 5)
    note(accounts, "r1", filler[:-10] + " jane.doe@example.com", "DE89 3704 0044 0532 0130 00 " * 2000)
    [(prompt, output)] = kept(accounts)
    assert len(prompt) <= MAX_CHARS + 10
    assert "jane" not in prompt
    assert prompt.endswith("…[cut]")
    assert set(output.split()) <= {"[iban]", "…[cut]", "DE89", "3704", "0044", "0532", "0130", "00"}
    assert output.count("DE89") <= 1
    accounts.close()


def test_a_keys_content_is_deleted_on_demand_and_leaves_no_trace(tmp_path: Path) -> None:
    accounts = Accounts.open(tmp_path / "gateway.db", RetentionOptions(store_content=True))
    for index in range(20):
        note(accounts, f"r{index}", SECRET, SECRET)
    note(accounts, "other", "kept", "kept", "key_2")
    assert len(kept(accounts)) == 20
    note(accounts, "last", SECRET, SECRET)
    accounts.content.forget("key_1")
    assert kept(accounts) == []
    assert kept(accounts, "key_2") == [("kept", "kept")]
    assert SECRET.encode() not in on_disk(accounts.store.path)
    accounts.close()


def test_content_is_deleted_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accounts = Accounts.open(tmp_path / "gateway.db", RetentionOptions(store_content=True, content_retention_days=7))
    assert kept(accounts) == []
    long_ago = time.time() - 7.1 * 86400
    with monkeypatch.context() as patched:
        patched.setattr(transcripts.time, "time", lambda: long_ago)
        note(accounts, "old", SECRET, SECRET)
    note(accounts, "new", "kept", "kept")
    assert len(kept(accounts)) == 2
    accounts.close()
    again = Accounts.open(tmp_path / "gateway.db")  # switched off now: what is old goes all the same
    assert kept(again) == [("kept", "kept")]
    assert SECRET.encode() not in on_disk(again.store.path)
    again.close()


def test_too_much_at_once_is_counted_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accounts = Accounts.open(tmp_path / "gateway.db", RetentionOptions(store_content=True))
    monkeypatch.setattr(accounts.content.buffer, "limit", 0)
    note(accounts, "r1", "a", "b")
    assert (kept(accounts), accounts.figures().content_dropped) == ([], 1)
    accounts.close()


def test_a_prompt_is_kept_as_text_so_that_no_escape_hides_what_is_in_it() -> None:
    parts = b'{"role":"user","content":[{"type":"text","text":"b"}]}'
    messages = b'[{"role":"user","content":"I am jane\\u0040example.com"},' + parts + b"]"
    assert prompt_text(messages) == "user: I am jane@example.com\nb"
    assert prompt_text(b'["a","b"]') == "a\nb"
    assert prompt_text(b"[1,2,3]") == ""
    assert prompt_text(b'["a",1,2]') == ""


def test_what_a_gateway_kept_is_what_was_asked_and_answered(tmp_path: Path) -> None:
    with gateway_before(tmp_path, Behavior(), arguments=("--store-content",)) as gateway:
        said = []
        for stream in (False, True):
            chat = {"model": "scripted", "max_tokens": 5, "messages": [{"role": "user", "content": "I am a@b.example"}]}
            plain = {"model": "scripted", "max_tokens": 5, "prompt": "Call +49 30 1234567"}
            for path, body in (("/v1/chat/completions", chat), ("/v1/completions", plain)):
                if stream:
                    said.append(text_of(gateway.stream(path, body)))
                else:
                    [choice] = gateway.post(path, body).json()["choices"]
                    said.append(choice["text"] if "text" in choice else choice["message"]["content"])

        def found() -> list[dict[str, str]]:
            answer: list[dict[str, str]] = gateway.admin.get("/admin/content?key=anonymous").json()["data"]
            return answer

        until(lambda: len(found()) == 4)
        asked = ["user: I am [e-mail]", "Call [phone]"] * 2
        assert [(one["prompt"], one["output"]) for one in reversed(found())] == list(zip(asked, said, strict=True))
        assert gateway.admin.delete("/admin/content?key=anonymous").status_code == 200
        assert found() == []
        read = gateway.admin.get("/admin/audit").json()["data"]
        assert {"content.read", "content.delete"} <= {entry["action"] for entry in read}
