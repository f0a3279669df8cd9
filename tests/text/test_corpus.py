"""The documentation of the running Python, as text to train on and to measure perplexity on."""

from __future__ import annotations

import pytest

from powerband.text.corpus import Document, documents, held_out_documents, is_held_out


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    return documents()


def test_it_holds_what_python_documents(corpus: list[Document]) -> None:
    entries = {entry.name: entry for document in corpus for entry in document.entries}
    assert entries["json.dumps"].summary == "Serialize ``obj`` to a JSON formatted ``str``."
    assert entries["len"].summary == "Return the number of items in a container."
    assert entries["posixpath.join"].signature == "(a, *p)"
    assert sum(len(document.text) for document in corpus) > 1_000_000


def test_no_text_is_both_trained_on_and_held_out(corpus: list[Document]) -> None:
    trained = {entry.text for document in corpus if not is_held_out(document.name) for entry in document.entries}
    held_out = {entry.text for document in corpus if is_held_out(document.name) for entry in document.entries}
    assert held_out
    assert not trained & held_out


def test_what_is_held_out_can_be_had_alone(corpus: list[Document]) -> None:
    assert held_out_documents() == [document for document in corpus if is_held_out(document.name)]
