from __future__ import annotations

from pathlib import Path

import pytest

from powerband.engine.kernels.cpu import library
from powerband.errors import EnvironmentFault, UsageError

ZEN_5 = ["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"]


@pytest.mark.parametrize(
    ("features", "tier"),
    [
        ([], "plain"),
        (["asimd", "bf16"], "plain"),
        (["avx2", "fma"], "plain"),
        (["avx2", "fma", "f16c"], "avx2"),
        (ZEN_5[:7], "avx512"),
        (ZEN_5, "avx512"),
        ([*ZEN_5, "amx_tile", "amx_int8"], "avx512"),
        ([*ZEN_5, "amx_tile", "amx_int8", "amx_bf16"], "amx"),
    ],
)
def test_best_tier_of_a_processor(features: list[str], tier: str) -> None:
    assert library.choose_tier("", features) == tier
    assert library.choose_tier("plain", features) == "plain"


def test_a_tier_that_cannot_run_is_refused() -> None:
    with pytest.raises(UsageError, match="this processor can run avx2, plain"):
        library.choose_tier("avx512", ["avx2", "fma", "f16c"])


def test_what_cannot_be_compiled_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.cpp").write_text("int f( {")
    monkeypatch.setattr(library, "SOURCES", tmp_path)
    monkeypatch.setenv("POWERBAND_CACHE", str(tmp_path / "cache"))
    with pytest.raises(EnvironmentFault, match=r"could not build the CPU kernels: .*broken\.cpp"):
        library.build("plain")
    assert not list((tmp_path / "cache").rglob("*.so")), "nothing half done is left"


def test_switched_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERBAND_KERNEL_TIER", "off")
    status = library.load.__wrapped__()
    assert (status.tier, status.reason) == (None, "POWERBAND_KERNEL_TIER is 'off'")
