"""`powerband calibrate`: what it measures, keeps and prints, and what it says of logs that tell nothing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from powerband.calibration import measure, quality
from powerband.calibration.curve_fit import FitErrors
from powerband.calibration.measure import ModelFit, with_refinement
from powerband.calibration.operator_fit import PrecisionFit
from powerband.calibration.quality import ReportProgress, better_of_two, busy_text, check_fits, left_out_text
from powerband.calibration.session import Calibration
from powerband.cli import progress
from powerband.cli.main import main
from powerband.cli.plan.inputs import measured_devices
from powerband.cost.measured_steps import MeasuredStepTimes
from powerband.cost.step_log import RunConfiguration, header_line
from powerband.errors import EnvironmentFault, UsageError
from powerband.spec.deployment import Quantization
from powerband.spec.hardware.catalog import (
    local_profile,
    local_profile_path,
    read_local_profile,
    read_profile,
    write_profile,
)
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.hardware.profile import (
    DeviceProfile,
    Evidence,
    GemmModel,
    HostModel,
    MeasuredMachine,
    Refinement,
    StepTimeModel,
)
from powerband.spec.model.reader import read_model_spec

CPU = detect_cpu()
KNOWN = DeviceProfile(
    name="local",
    kind="cpu",
    architecture="cpu",
    memory_bytes=2**34,
    bandwidth_bytes_per_s=30e9,
    peak_flops_per_s={"16bit": 1e12},
    multiprocessors=CPU.cores,
    machine=MeasuredMachine(name=CPU.name, cores=CPU.cores, threads=CPU.cores, date="2026-11-21"),
)
GEMM = GemmModel(compute_share=0.5, memory_share=0.5, overhead_s=1e-5, evidence=Evidence(source="test", error=0.1))
FORM = RunConfiguration(
    model="abc",
    name="mine",
    dtype="bfloat16",
    quantization="none",
    kv_dtype="bfloat16",
    device="cpu",
    device_name=CPU.name,
    threads=CPU.cores,
    powerband="0.1",
)


FLAT = StepTimeModel(
    tokens=(1,),
    token_s=(0.001,),
    rows=(1,),
    row_s=(0.0,),
    positions=(0, 100000),
    position_s=(0.0, 0.0),
    decode_s=0.0,
    chunk_s=0.0,
    pair_s=0.0,
    read_s=0.0,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles of these tests are this machine's, but not for anybody else."""
    monkeypatch.setattr(
        "powerband.spec.hardware.catalog.local_profile_path", lambda threads=None: tmp_path / "local.yaml"
    )


def test_the_demo_model_is_measured_alone_and_under_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.yaml"
    write_profile(KNOWN, path)
    # However busy this machine is.
    monkeypatch.setattr("powerband.calibration.quality.MAX_P90", math.inf)
    monkeypatch.setattr("powerband.calibration.quality.MAX_MEDIAN", math.inf)
    assert main(["calibrate", "demo", "--seconds", "3", "--out", str(path), "--json", "--force"]) == 0
    [row] = json.loads(capsys.readouterr().out)["measured"]
    assert (row["what"], row["steps"] >= 16) == ("demo, 16 bits", True)
    [refinement] = read_profile(path).refinements
    assert refinement.model == read_model_spec("src/powerband/demo").shape_digest
    seconds = MeasuredStepTimes(refinement.steps).step_s([(1, 100)], 1)
    assert 1e-5 < seconds < 1
    assert refinement.host is not None
    assert 1e-5 < refinement.host.arrival_s < 1
    assert 1e-5 < refinement.host.answer_s < 1


def steps(count: int, scale: float = 1.0) -> list[str]:
    """Decodes of one to eight requests, which take a millisecond and a tenth for each of them."""
    return [
        json.dumps(
            {
                "step": number,
                "at": number / 10,
                "s": scale * (0.001 + 0.0001 * (1 + number % 8)),
                "in_flight_s": 0.002,
                "new": [1] * (1 + number % 8),
                "context": [100 + number] * (1 + number % 8),
                "sampled": 1 + number % 8,
            }
        )
        for number in range(1, count)
    ]


def test_a_step_log_refines_the_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, log = tmp_path / "profile.yaml", tmp_path / "steps.jsonl"
    write_profile(KNOWN, path)
    log.write_text("\n".join([header_line(FORM), *steps(200)]) + "\n")
    assert main(["calibrate", "--from", str(log), "-o", str(path)]) == 0
    assert "mine, 16 bits  199" in capsys.readouterr().out
    [first] = read_profile(path).refinements
    assert MeasuredStepTimes(first.steps).step_s([(1, 200)] * 4, 4) == pytest.approx(0.0014, rel=0.03)
    log.write_text("\n".join([header_line(FORM), *steps(400, scale=1.5)]) + "\n")
    assert main(["calibrate", "--from", str(log), "-o", str(path)]) == 0
    [second] = read_profile(path).refinements
    assert MeasuredStepTimes(second.steps).step_s([(1, 200)] * 4, 4) == pytest.approx(0.0021, rel=0.03)


def erratic(count: int) -> list[str]:
    """Two steps in three take twenty times as long, for no reason that a step's shape shows."""
    even, slow = steps(count), steps(count, scale=20.0)
    return [slow[i] if i % 3 else even[i] for i in range(len(even))]


def test_a_busy_machine_is_named_with_its_processes_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quality, "_BUSY_PERCENT", 0.1)  # others use this machine, too
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    monkeypatch.setattr(psutil, "process_iter", lambda: [psutil.Process(pid) for pid in (spinning.pid, os.getpid())])
    try:
        wait_until_busy(spinning.pid)
        text = busy_text(2.0)
        assert f"(pid {spinning.pid})" in text
        assert f"(pid {os.getpid()})" not in text
    finally:
        spinning.kill()
        spinning.wait()
    assert f"The load average is {2.0 * (os.cpu_count() or 1):.1f} on" in text
    assert busy_text(0.1) == ""


def wait_until_busy(pid: int) -> None:
    process, deadline_s = psutil.Process(pid), time.monotonic() + 30
    while sum(process.cpu_times()[:2]) < 0.2:
        assert time.monotonic() < deadline_s


def test_without_a_terminal_progress_is_a_line_for_each_phase(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress_bar() as report:
        for second in range(1, 9):
            now[0] = float(second)
            report("bf16: matrices" if second < 5 else "bf16: fit", second / 9)
    assert capsys.readouterr().err == "· 2 s: bf16: matrices\n· 5 s: bf16: fit\n"


def test_a_fit_that_is_far_off_is_refused_with_the_reason_unless_it_is_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (7.5, 7.5, 7.5))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    path, log = tmp_path / "profile.yaml", tmp_path / "steps.jsonl"
    write_profile(KNOWN, path)
    log.write_text("\n".join([header_line(FORM), *erratic(400)]) + "\n")
    assert main(["calibrate", "--from", str(log), "-o", str(path)]) == 3
    shown = capsys.readouterr().err
    assert "too far off to plan with, and nothing was kept: mine, 16 bits: half of the steps are off by" in shown
    assert "The load average was 7.5 on 2 cores before it began: other programs run here." in shown
    assert "with --force, which keeps whatever is measured" in shown
    assert read_profile(path) == KNOWN
    assert main(["calibrate", "--from", str(log), "-o", str(path), "--force"]) == 0
    assert read_profile(path).refinements


@pytest.mark.parametrize(("p90s", "kept"), [([0.2], 0.2), ([4.59, 0.3], 0.3), ([4.59, 5.0], 4.59)])
def test_what_is_too_far_off_is_measured_once_more_and_the_better_is_kept(p90s: list[float], kept: float) -> None:
    measured, shown = iter(p90s), list[str]()

    def measure(report: ReportProgress) -> FitErrors:
        report("16 bits", 0.5)
        return FitErrors(10, 0.1, 0.1, next(measured), 0.0)

    found = better_of_two(measure, lambda fit: fit, lambda text, _: shown.append(text))
    assert found.p90 == kept
    assert next(measured, None) is None
    assert shown == ["16 bits", "16 bits (once more, since the error was ±459%)"][: len(p90s)]


@pytest.mark.parametrize(("force", "kept"), [(False, {"none", "int4"}), (True, {"none", "int8", "int4"})])
def test_int8_that_is_far_off_is_left_out_and_the_rest_is_kept(
    monkeypatch: pytest.MonkeyPatch, force: bool, kept: set[str]
) -> None:
    errors = {"none": 0.2, "int8": 2.19, "int4": 0.3}

    def measured(
        _device: str, _threads: None, precision: Quantization, _s: float, known: DeviceProfile | None, _report: object
    ) -> tuple[DeviceProfile, PrecisionFit]:
        before = (known or KNOWN).gemm.get("powerband", {})
        profile = replace(known or KNOWN, gemm={"powerband": {**before, precision: GEMM}})
        return profile, PrecisionFit(precision, 100, 1e9, 1e9, FitErrors(100, 0.1, 0.1, errors[precision], 0.0))

    monkeypatch.setattr(measure, "_measure_precision", measured)
    machine = measure.measure_machine("cpu", None, 1.0, lambda *_: None, force=force)
    found = Calibration(machine.profile, machine, None)
    assert set(machine.profile.gemm["powerband"]) == kept
    assert [row["kept"] for row in found.rows()] == [True, force, True]
    if not force:
        check_fits(found.rows(), None, 0.0)
    text = left_out_text([fit.quantization for fit in found.left_out])
    assert text == "" if force else text.startswith("int8: too far off to plan with, so not kept")


def test_16_bits_that_are_far_off_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = PrecisionFit("none", 100, 1e9, 1e9, FitErrors(100, 0.1, 0.6, 2.0, 0.0))
    profile = replace(KNOWN, gemm={"powerband": {"none": GEMM}})
    found = Calibration(profile, measure.DeviceFits(profile, (fit,)), None)
    with pytest.raises(EnvironmentFault, match="nothing was kept: any model, 16 bits"):
        check_fits(found.rows(), None, 0.0)


def test_a_way_of_a_second_from_the_engine_to_a_client_is_refused() -> None:
    host = HostModel(
        step_s=1e-3, per_request_s=1e-5, arrival_s=1e-3, answer_s=1.108, evidence=Evidence(source="test", error=0.3)
    )
    refinement = Refinement(
        model="abc", name="mine", steps=FLAT, host=host, evidence=Evidence(source="test", error=0.1)
    )
    found = Calibration(KNOWN, None, ModelFit(refinement, 100, FitErrors(100, 0.1, 0.1, 0.2, 0.0), 50))
    with pytest.raises(EnvironmentFault, match="a token to its client takes 1108 ms"):
        check_fits(found.rows(), found.host, 0.0)


@pytest.mark.parametrize(
    ("lines", "code", "told"),
    [
        ([], 2, "holds no steps"),
        (["nonsense"], 2, "so it is not a step log"),
        ([header_line(FORM), *steps(3)], 2, "2 steps are too few"),
        ([header_line(replace(FORM, device_name="EPYC")), *steps(50)], 2, "is of EPYC with"),
    ],
)
def test_logs_that_tell_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str], code: int, told: str
) -> None:
    path, log = tmp_path / "profile.yaml", tmp_path / "steps.jsonl"
    write_profile(KNOWN, path)
    log.write_text("".join(line + "\n" for line in lines))
    assert main(["calibrate", "--from", str(log), "-o", str(path)]) == code
    assert told in capsys.readouterr().err
    assert read_profile(path) == KNOWN


def test_a_log_refines_nothing_where_nothing_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "steps.jsonl"
    log.write_text("\n".join([header_line(FORM), *steps(50)]) + "\n")
    assert main(["calibrate", "--from", str(log), "-o", str(tmp_path / "none.yaml")]) == 3
    assert "Run 'powerband calibrate' first" in capsys.readouterr().err


def test_a_profile_of_another_machine_is_not_this_machines(tmp_path: Path) -> None:
    machine = MeasuredMachine(name="EPYC", cores=96, threads=96, date="2026-11-21")
    write_profile(replace(KNOWN, machine=machine), tmp_path / "local.yaml")
    assert local_profile() is None
    with pytest.raises(EnvironmentFault, match="measured on another machine \\(EPYC, 96 cores\\)"):
        read_local_profile()
    write_profile(KNOWN, tmp_path / "local.yaml")
    assert read_local_profile() == local_profile() == KNOWN


def measured_with(threads: int, cores: int = 8) -> DeviceProfile:
    machine = MeasuredMachine(name=CPU.name, cores=cores, threads=threads, date="2026-11-30")
    return replace(KNOWN, machine=machine)


def test_a_profile_is_kept_for_each_number_of_threads_and_replicas_find_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("POWERBAND_DEVICE_PROFILE", raising=False)
    monkeypatch.setenv("POWERBAND_CACHE", str(tmp_path))
    monkeypatch.setattr("powerband.spec.hardware.catalog.detect_cpu", lambda: replace(CPU, cores=8))
    for threads in (8, 4, 1):
        write_profile(measured_with(threads), local_profile_path(threads))
    assert len(list((tmp_path / "profiles").iterdir())) == 3
    assert local_profile_path() == local_profile_path(8) == tmp_path / "profiles" / "local.yaml"
    found = {replicas: read_local_profile(replicas).threads for replicas in (None, 1, 2, 3, 4, 8)}
    assert found == {None: 8, 1: 8, 2: 4, 3: 1, 4: 1, 8: 1}
    with pytest.raises(UsageError, match="9 replicas on 8 cores"):
        read_local_profile(9)
    for threads in (4, 1):
        local_profile_path(threads).unlink()
    with pytest.raises(
        EnvironmentFault, match="measured with 8 threads; 2 replicas on its 8 cores have 4 each"
    ) as caught:
        read_local_profile(2)
    assert caught.value.hint == "Measure it, in two minutes on a CPU: powerband calibrate --threads 4"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_on_a_terminal_a_machine_that_is_planned_for_is_measured_first(
    is_terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int | None] = []

    def measure(threads: int | None) -> None:
        asked.append(threads)
        write_profile(measured_with(CPU.cores, CPU.cores), tmp_path / "local.yaml")

    monkeypatch.setattr("powerband.cli.plan.calibrate.calibrate_machine_once", measure)
    for stream in (sys.stdin, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    if is_terminal:
        assert [profile.name for profile in measured_devices("local", None, ())] == ["local"]
        assert asked == [None]
        assert "This machine has not been measured yet. Measuring it now, once" in capsys.readouterr().err
    else:
        with pytest.raises(EnvironmentFault, match="has not been measured yet") as caught:
            measured_devices("local", None, (), 2)
        assert caught.value.hint.endswith(f"powerband calibrate --threads {max(CPU.cores // 2, 1)}")
        assert asked == []


def test_a_model_has_one_refinement_in_each_form() -> None:
    refinement = Refinement(model="abc", name="mine", steps=FLAT, evidence=Evidence(source="test", error=0.1))
    once = with_refinement(with_refinement(KNOWN, refinement), replace(refinement, name="again"))
    assert [known.name for known in once.refinements] == ["again"]
    both = with_refinement(once, replace(refinement, quantization="int8", kv_precision="int8"))
    assert len(both.refinements) == 2


def test_the_usual_place_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("POWERBAND_CACHE", str(tmp_path))
    assert local_profile_path() == tmp_path / "profiles" / "local.yaml"


def test_a_profile_that_could_not_be_written_is_not_measured_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object, **__: object) -> None:
        raise AssertionError("minutes of measuring")

    monkeypatch.setattr("powerband.calibration.session.calibrate_machine", measure)
    assert main(["calibrate", "--out", "/proc/nowhere/local.yaml"]) == 3
    shown = capsys.readouterr().err
    assert "Cannot write /proc/nowhere/local.yaml" in shown
    assert "Set POWERBAND_CACHE to a folder that this user can write. Or name another file with --out." in shown
