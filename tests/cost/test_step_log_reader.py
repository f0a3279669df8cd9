"""What a step log says when it is read, and what is said of one that is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from powerband.cost.step_log import RunConfiguration, StepSample, header_line, read_step_log
from powerband.errors import EnvironmentFault, UsageError

FORM = RunConfiguration(
    model="abc",
    name="demo",
    dtype="bfloat16",
    quantization="none",
    kv_dtype="bfloat16",
    device="cpu",
    device_name="Xeon",
    threads=2,
    powerband="0.1",
)
STEP = '{"step":1,"at":2.0,"s":0.5,"in_flight_s":0.5,"new":[8,1],"context":[8,40],"sampled":2,"kv_used":3}'
FAILED = STEP[:-1] + ',"failed":true}'


def log(path: Path, *lines: str, end: str = "\n") -> Path:
    path.write_text("\n".join(lines) + end)
    return path


def test_each_start_of_an_engine_is_a_run(tmp_path: Path) -> None:
    empty_start = header_line(FORM)
    runs = read_step_log(log(tmp_path / "log", header_line(FORM), STEP, FAILED, empty_start, header_line(FORM), STEP))
    assert [run.form for run in runs] == [FORM, FORM]
    assert runs[0].samples == (StepSample(((8, 8), (1, 40)), 2, 0.5, 2.0, 2.5),)


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    [run] = read_step_log(log(tmp_path / "log", header_line(FORM), STEP, STEP[:20], end=""))
    assert len(run.samples) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], "holds no steps"),
        ([header_line(FORM)], "holds no steps"),
        ([header_line(FORM), FAILED], "holds no steps"),
        ([STEP], "does not begin with a line that names what ran"),
        ([header_line(FORM), STEP[:20]], "line 2: JSON is malformed"),
        ([header_line(FORM), STEP.replace('"s":0.5', '"s":"x"')], "line 2: Expected `float`"),
        ([header_line(FORM), STEP.replace("[8,40]", "[8]")], "line 2: this is not a valid step"),
        ([header_line(FORM), STEP.replace("[8,40]", "[7,40]")], "line 2: this is not a valid step"),
        ([header_line(FORM), STEP.replace('"s":0.5', '"s":0')], "line 2: this is not a valid step"),
        ([header_line(FORM).replace('"step_log":1', '"step_log":9')], "of version 9"),
        (["\x00\x01\x02"], "does not begin with"),
    ],
)
def test_what_is_no_step_log(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_step_log(log(tmp_path / "log", *lines))
    assert caught.value.param == "from"


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="Cannot read"):
        read_step_log(tmp_path / "none")
