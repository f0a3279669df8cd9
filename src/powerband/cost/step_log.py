"""Measured steps: what a latency model is fitted to. From an engine's step log, or timed one by one.

A log has a line that says what ran, then one for each step. An engine that starts again appends both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from powerband.errors import EnvironmentFault, UsageError
from powerband.spec.deployment import KVPrecision, Quantization

LOG_VERSION = 1
_MAX_LINE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfiguration:
    """What ran: which shape of model, in which precisions, on what."""

    model: str  # ModelSpec.shape_digest
    name: str
    dtype: str  # of activations, and of weights that are not quantized
    quantization: Quantization
    kv_dtype: str
    device: str  # cpu, cuda:0
    device_name: str
    threads: int | None  # on a CPU
    powerband: str  # version

    @property
    def kv_precision(self) -> KVPrecision:
        named: dict[str, KVPrecision] = {"float32": "float32", "int8": "int8"}
        return named.get(self.kv_dtype, "16bit")


@dataclass(frozen=True, slots=True)
class StepSample:
    """A measured step."""

    works: tuple[tuple[int, int], ...]  # (new tokens, context after them) of each request
    sampled: int  # rows
    seconds: float  # of the step alone
    at_s: float = 0.0  # when it was submitted, on the engine's clock; 0: not recorded
    end_s: float = 0.0  # when its result arrived; 0: not recorded

    @property
    def num_tokens(self) -> int:
        return sum(new for new, _ in self.works)


@dataclass(frozen=True, slots=True)
class StepLogRun:
    """One start of an engine, and the steps that it took."""

    form: RunConfiguration
    samples: tuple[StepSample, ...]


class _StepLine(msgspec.Struct):
    s: float
    at: float
    in_flight_s: float
    new: list[int]
    context: list[int]
    sampled: int
    failed: bool = False


class _Header(msgspec.Struct):
    step_log: int
    form: RunConfiguration


def header_line(form: RunConfiguration) -> str:
    """The first line of a log."""
    return msgspec.json.encode(_Header(LOG_VERSION, form)).decode()


def read_step_log(path: Path) -> list[StepLogRun]:
    """Every start of an engine in the log, without those that took no step.

    A last line that is still being written is left out. Raises EnvironmentFault when the file cannot be read, and
    UsageError, naming the line, when it is no step log or holds no step.
    """
    runs: list[StepLogRun] = []
    form: RunConfiguration | None = None
    samples: list[StepSample] = []
    for number, line in _lines(path):
        if line.startswith(b'{"step_log"'):
            if form is not None and samples:
                runs.append(StepLogRun(form, tuple(samples)))
            form, samples = _decoded(line, _Header, path, number).form, []
        elif form is None:
            raise UsageError(
                f"{path} does not begin with a line that names what ran, so it is not a step log.",
                hint="Write one with 'powerband serve MODEL --step-log FILE'.",
                param="from",
            )
        elif (sample := _sample(_decoded(line, _StepLine, path, number), path, number)) is not None:
            samples.append(sample)
    if form is not None and samples:
        runs.append(StepLogRun(form, tuple(samples)))
    if not runs:
        raise UsageError(f"{path} holds no steps.", hint="Let the engine answer some requests first.", param="from")
    return runs


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE_BYTES):
                number += 1
                if line.endswith(b"\n"):
                    if line.strip():
                        yield number, line
                elif len(line) == _MAX_LINE_BYTES:
                    raise UsageError(f"{path}, line {number}: longer than any step.", param="from")
    except OSError as problem:
        raise EnvironmentFault(f"Cannot read {path}: {problem.strerror}.", param="from") from None


def _decoded(line: bytes, kind: type[Any], path: Path, number: int) -> Any:
    try:
        found = msgspec.json.decode(line, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as problem:
        raise UsageError(f"{path}, line {number}: {str(problem)[:200]}.", param="from") from None
    if isinstance(found, _Header) and found.step_log != LOG_VERSION:
        raise UsageError(
            f"{path} is a step log of version {found.step_log}; this is version {LOG_VERSION}.", param="from"
        )
    return found


def _sample(line: _StepLine, path: Path, number: int) -> StepSample | None:
    """None for a step that failed."""
    if line.failed:
        return None
    works = tuple(zip(line.new, line.context, strict=False))
    is_shape = len(line.new) == len(line.context) > 0 and all(0 < new <= context for new, context in works)
    if not is_shape or not 0 <= line.sampled <= len(works) or not line.s > 0:
        raise UsageError(f"{path}, line {number}: this is not a valid step.", param="from")
    return StepSample(works, line.sampled, line.s, line.at, line.at + line.in_flight_s)
