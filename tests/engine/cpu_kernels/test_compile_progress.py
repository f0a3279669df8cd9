"""The first start compiles for up to a minute: stderr shows it, with or without a terminal."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest

from powerband.engine.kernels.cpu import library


def test_compiling_shows_itself_at_once_and_reports_its_fraction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> None:
        commands.append(command)
        Path(command[command.index("-o") + 1]).touch()

    monkeypatch.setattr(library, "_run", run)
    monkeypatch.setattr(library, "cache_directory", lambda: tmp_path)
    fractions: list[float] = []
    assert library.build("plain", fractions.append).exists()
    assert "Compiling the CPU kernels for this processor. This happens once" in capsys.readouterr().err
    assert fractions[-1] == 1.0
    assert fractions == sorted(fractions)
    assert library.build("plain", fractions.append).exists()
    assert capsys.readouterr().err == "", "once compiled, nothing is said"


def test_long_compilation_goes_on_showing_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "REPORT_EVERY_S", 0.0)
    first, second = Future[str](), Future[str]()
    first.set_result("a.o")

    def progress(fraction: float) -> None:
        if fraction == 0.5 and not second.done():
            second.set_result("b.o") if shown() else None

    def shown() -> bool:
        said.append(capsys.readouterr().err)
        return "1 of 2 files" in "".join(said)

    said: list[str] = []
    assert library._follow([first, second], progress) == ["a.o", "b.o"]
    assert "1 of 2 files" in "".join(said)
