"""Where peers and models lie: outside the repository, in $BENCH_CPU_HOME or ~/.cache/powerband/bench."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Places:
    home: Path
    llama_build: Path | None = None  # one that exists already
    llama_sources: Path | None = None

    @classmethod
    def default(cls, llama_build: str | None = None, llama_sources: str | None = None) -> Places:
        home = Path(os.environ.get("BENCH_CPU_HOME") or Path.home() / ".cache" / "powerband" / "bench")
        build = llama_build or os.environ.get("LLAMA_CPP_BUILD")
        sources = llama_sources or os.environ.get("LLAMA_CPP_SOURCES")
        return cls(home, Path(build) if build else None, Path(sources) if sources else None)

    def venv(self, peer: str) -> Path:
        return self.home / "venvs" / peer

    def python(self, peer: str) -> str:
        return str(self.venv(peer) / "bin" / "python")

    @property
    def llama_bin(self) -> Path:
        return (self.llama_build or self.home / "llama.cpp" / "build") / "bin"

    @property
    def llama_cpp(self) -> Path:
        """llama.cpp's sources, for its converter."""
        return self.llama_sources or self.home / "llama.cpp" / "sources" / "vendor" / "llama.cpp"

    def model(self, shape: str, form: str) -> Path:
        """form: checkpoint, openvino-bf16, …, bf16.gguf, …"""
        return self.home / "models" / shape / form
