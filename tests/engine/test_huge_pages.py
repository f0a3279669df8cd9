from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from powerband.engine.huge_pages import HUGE_PAGE, huge_empty


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1 << 20, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float32])
def test_has_the_shape_and_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = huge_empty(shape, dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    assert tensor.fill_(3).eq(3).all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages")
def test_large_memory_begins_on_a_huge_page_and_is_zero() -> None:
    tensor = huge_empty((HUGE_PAGE * 20 + 1,), torch.uint8)
    assert tensor.data_ptr() % HUGE_PAGE == 0
    assert not tensor.any()


def test_memory_goes_back_when_the_tensor_does() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    tensor = huge_empty((256 << 20,), torch.uint8).fill_(1)
    assert resident() - before > 200 << 20
    del tensor
    assert resident() - before < 56 << 20


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages")
def test_tensors_lie_side_by_side() -> None:
    sizes = (5000, 1 << 20, 4097, (1 << 21) - 1, 1 << 22)
    tensors = [huge_empty((size,), torch.uint8) for size in sizes for _ in range(12)]
    for number, tensor in enumerate(tensors):
        assert tensor.data_ptr() % 64 == 0
        assert not tensor.any()
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    regions = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert len(regions) <= 4
