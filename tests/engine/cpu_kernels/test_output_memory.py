from __future__ import annotations

import resource

import torch

ROWS, SIZE = 4096, 2048  # 16 MiB in bf16


def norm(x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.powerband.rms_norm(x, torch.ones(x.shape[-1], dtype=x.dtype), 1e-6)
    return out


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_large_results_use_memory_again() -> None:
    x = torch.ones(ROWS, SIZE, dtype=torch.bfloat16)
    address = norm(x).data_ptr()
    before = page_faults()
    assert [norm(x).data_ptr() for _ in range(5)] == [address] * 5
    assert page_faults() - before < 1000, "5 fresh results would be 20,480 pages of 4 KiB"


def test_results_that_are_alive_do_not_share_memory() -> None:
    x = torch.ones(ROWS, SIZE, dtype=torch.bfloat16)
    results = [norm(x * scale) for scale in (1, -1, 0)]
    for result, expected in zip(results, (1, -1, 0), strict=True):
        assert result.eq(expected).all()
    views = [result[:10] for result in results]
    del results
    norm(x)
    assert [view.float().mean().item() for view in views] == [1, -1, 0], "a view keeps its memory"


def test_memory_serves_smaller_and_larger_results_after_it() -> None:
    shapes = [(1024, 1024), (4096, 1024), (8192, 1024), (1024, 1024), (16, 16)]
    for rows, size in [*shapes, *reversed(shapes)]:
        x = torch.full((rows, size), 3.0, dtype=torch.bfloat16)
        out = norm(x)
        assert (out.shape, out.dtype, out.is_contiguous()) == ((rows, size), torch.bfloat16, True)
        assert out.eq(1).all()
