"""The step log: each step's shape and seconds as a line of JSON, to calibrate a latency model. No prompt's content.

    {"step_log": 1, "form": {"model": "1f0c…", "name": "demo", "dtype": "bfloat16", …}}
    {"step": 17, "at": 81.2, "s": 0.0123, "in_flight_s": 0.0125, "new": [1, 1, 256], "context": [812, 40, 256],
     "sampled": 2, "kv_used": 41, "kv_total": 512}

The first line describes what runs (cost.step_log.RunConfiguration). It is written at each start and at the top of each
new file.
`new`: tokens computed, by request. `context`: positions seen by the last of them. `at`: submission, by the
monotonic clock. `s`: from submission, or from the end of the step before if that came later.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

from powerband.core.loop import StepRecord
from powerband.cost.step_log import RunConfiguration, header_line
from powerband.errors import EnvironmentFault

DEFAULT_LIMIT_BYTES = 64 << 20
_FLUSH_S = 1.0  # the log of a live engine is read, too


class StepLog:
    """An observer for EngineCore. When the file reaches `limit_bytes` it becomes FILE.1, replacing an older one."""

    def __init__(self, path: Path, form: RunConfiguration, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.path = path
        self._header = header_line(form)
        self.limit_bytes = limit_bytes
        try:
            self._file = path.open("a", encoding="ascii", buffering=1 << 16)
        except OSError as problem:
            raise EnvironmentFault(
                f"The step log {path} cannot be written: {problem.strerror}.",
                hint="Name a file in a folder that exists and that you may write to.",
                param="step_log",
            ) from problem
        self._size = self._file.tell()
        self._flushed_s = 0.0
        self._write(self._header)

    def __call__(self, record: StepRecord) -> None:
        works = record.step.works
        line = json.dumps(
            {
                "step": record.step.index,
                "at": round(record.submitted_s, 7),
                "s": round(record.exclusive_s, 7),
                "in_flight_s": round(record.seconds, 7),
                "new": [work.num_tokens for work in works],
                "context": [work.start + work.num_tokens for work in works],
                "sampled": sum(work.samples for work in works),
                "kv_used": record.usage.num_used,
                "kv_total": record.usage.num_blocks,
                **({"failed": True} if record.result is None else {}),
            },
            separators=(",", ":"),
        )
        if self._size + len(line) >= self.limit_bytes:
            self._rotate()
        self._write(line)
        if record.submitted_s - self._flushed_s >= _FLUSH_S:
            self._file.flush()
            self._flushed_s = record.submitted_s

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._size += len(line) + 1

    def _rotate(self) -> None:
        self._file.close()
        self.path.replace(self.path.with_name(self.path.name + ".1"))
        self._file = self.path.open("w", encoding="ascii", buffering=1 << 16)
        self._size = 0
        self._write(self._header)
