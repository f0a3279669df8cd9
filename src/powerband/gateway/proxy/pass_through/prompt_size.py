"""How large the prompts of a request are, before a replica has counted them: estimates and upper bounds in tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from msgspec import Raw

from powerband.dispatch.estimates import BYTES_PER_TOKEN
from powerband.errors import InvalidRequest
from powerband.gateway.proxy.pass_through.endpoints import PassThroughEndpoint
from powerband.gateway.proxy.request_fields import max_text_bytes

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"')


class PromptSize(NamedTuple):
    prompt: bytes  # its JSON
    tokens: int  # estimated
    max_tokens: int


def measure(endpoint: PassThroughEndpoint, fields: Mapping[str, Raw]) -> PromptSize:
    """Raises InvalidRequest if the prompt is missing, or if there are two."""
    prompt = _only(endpoint.prompts, fields)
    if endpoint.queries:
        return _measure_pairs(_only(endpoint.queries, fields), prompt)
    others = sum(len(name) + len(bytes(value)) for name, value in fields.items()) - len(prompt)
    if prompt.startswith(b"[") and b'"' not in prompt:  # token ids
        num_ids = prompt.count(b",") + 1
        return PromptSize(prompt, num_ids, num_ids + others)
    before = sum(len(bytes(fields[name])) for name in endpoint.before if name in fields)
    # A token has at least one byte, and the JSON around a text has more bytes than a template adds tokens.
    return PromptSize(prompt, max(1, (len(prompt) + before) // BYTES_PER_TOKEN), max_text_bytes(prompt) + others)


def _measure_pairs(query: bytes, documents: bytes) -> PromptSize:
    """The model reads the query again for each document; several queries are paired with one document each."""
    num_queries, num_documents = _count(query), _count(documents)
    times = max(num_documents, 1) if num_queries <= 1 else 1
    size = len(query) * times + len(documents)
    return PromptSize(
        documents, max(1, size // BYTES_PER_TOKEN), max_text_bytes(query) * times + max_text_bytes(documents)
    )


def _count(texts: bytes) -> int:
    """The number of texts; of objects, an upper bound."""
    return sum(1 for _ in _STRING.finditer(texts))


def _only(names: tuple[str, ...], fields: Mapping[str, Raw]) -> bytes:
    found = [name for name in names if name in fields and bytes(fields[name]) != b"null"]
    if not found:
        shown = " or ".join(f"'{name}'" for name in names)
        raise InvalidRequest(f"{shown} is missing.", param=names[0])
    if len(found) > 1:  # engines would disagree about which one counts
        raise InvalidRequest(f"There are '{found[0]}' and '{found[1]}'.", hint="Send one of them.", param=found[1])
    return bytes(fields[found[0]])
