"""The kernels' threads: whoever computes, and however many, the results are the same, and nobody waits for ever."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

ops = torch.ops.powerband


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def product() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1000, 512, generator=generator).bfloat16()
    return torch.randn(3, 512, generator=generator).bfloat16(), ops.pack_bf16(weight)


def test_any_number_of_threads_gives_the_same() -> None:
    x, packed = product()
    torch.set_num_threads(1)
    expected = ops.linear_bf16(x, packed, None, 1000)
    for count in (2, 5, 3, 2):
        torch.set_num_threads(count)
        for _ in range(50):
            assert torch.equal(ops.linear_bf16(x, packed, None, 1000), expected)


def test_callers_do_not_disturb_each_other() -> None:
    x, packed = product()
    expected = ops.linear_bf16(x, packed, None, 1000)
    wrong = []

    def call() -> None:
        torch.set_num_threads(2)
        wrong.extend(i for i in range(200) if not torch.equal(ops.linear_bf16(x, packed, None, 1000), expected))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not wrong
    assert not any(caller.is_alive() for caller in callers)


def test_a_forked_process_has_threads_of_its_own() -> None:
    x, packed = product()
    torch.set_num_threads(2)
    expected = ops.linear_bf16(x, packed, None, 1000)
    child = os.fork()
    if child == 0:
        same = torch.equal(ops.linear_bf16(x, packed, None, 1000), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
