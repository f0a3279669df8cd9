"""Memory for what is large and stays: weights and the KV cache, in huge pages where the system has them."""

from __future__ import annotations

import contextlib
import math
import mmap
import threading

import torch

HUGE_PAGE = 2 << 20
_SHARED = 64 << 20  # bytes that tensors share of which more than one fit
_ALIGNMENT = 64
_SMALL = 4096  # bytes; less is in one page anyway


def huge_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor of zeros that asks for huge pages; small ones (below 4 KiB) come from torch, uninitialised.

    A kernel that streams weights crosses a page of 4 KiB every 100 ns; with pages of 2 MiB the processor looks up 512
    times fewer addresses. Memory is taken when it is first written to. Tensors up to 32 MiB lie side by side, so that
    no huge page is left half empty, and a kernel that fetches ahead finds the next weight behind this one. Such memory
    goes back when the last of them does: for a short life torch's own is better.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = _region(size) if size > _SHARED // 2 else _side_by_side.take(size)
    return memory.view(dtype).view(shape)


def _region(size: int) -> torch.Tensor:
    """Bytes of its own that begin on a huge page."""
    whole_pages = -(-size // HUGE_PAGE) * HUGE_PAGE
    region = mmap.mmap(-1, whole_pages + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system kernel without huge pages: ordinary ones do
        region.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(region, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size]


class _SharedRegion:
    """Hands out one region piece by piece, then begins another. A region lives as long as any piece of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._region = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, size: int) -> torch.Tensor:
        with self._lock:
            if self._used + size > len(self._region):
                self._region, self._used = _region(_SHARED), 0
            piece = self._region[self._used : self._used + size]
            self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return piece


_side_by_side = _SharedRegion()
