"""What is said of a body that is wrong: the field, the value, and never all of what was sent."""

from __future__ import annotations

import contextlib
import time

import pytest

from powerband.errors import InvalidRequest
from powerband.server.protocol import ChatRequest, CompletionRequest
from powerband.web.body import decode


def complaint(data: bytes, kind: type = CompletionRequest) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        decode(data, kind)
    return caught.value


@pytest.mark.parametrize("name", ["k", " - at `$.model`", "` - at `$", "a`b"])
def test_a_long_unknown_name_is_cut(name: str) -> None:
    problem = complaint(b'{"model":"m","prompt":"a","%b":1}' % (name.encode() * 100_000))
    assert problem.code == "unknown_parameter"
    assert problem.message.startswith(f"Unknown field '{name}")
    assert len(problem.message) < 200


def test_the_place_of_what_is_wrong_is_found_behind_any_text() -> None:
    role = complaint(b'{"model":"m","messages":[{"role":" - at `$.x`","content":"a"}]}', ChatRequest)
    assert role.param == "messages.0.role"
    bias = complaint(b'{"model":"m","prompt":"a","logit_bias":{"a - at `$.b`":1}}')
    assert bias.param == "logit_bias"
    assert complaint(b'{"model":"m","prompt":"a","stop":["b",1]}').param == "stop.1"
    nested = complaint(b'{"model":"m","prompt":"a","stream_options":{"include_usag":true}}')
    assert (nested.param, nested.hint) == ("stream_options.include_usag", "Did you mean 'include_usage'?")


def cpu_s(data: bytes) -> float:
    def once() -> float:
        start_s = time.process_time()
        with contextlib.suppress(InvalidRequest):
            decode(data, CompletionRequest)
        return time.process_time() - start_s

    return min(once() for _ in range(3))


def test_a_complaint_takes_about_as_long_as_what_is_right() -> None:
    text = b" - at `$" * (1 << 18)
    right = cpu_s(b'{"model":"m","prompt":"%b"}' % text)
    assert cpu_s(b'{"model":"m","prompt":"a","%b":1}' % text) < 6 * right
