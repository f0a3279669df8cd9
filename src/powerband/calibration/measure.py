"""What `powerband calibrate` measures: this machine with small made-up models, and single models as they are served."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from powerband.calibration.bandwidth import read_bandwidth_bytes_per_s
from powerband.calibration.curve_fit import FitErrors
from powerband.calibration.engine_fit import (
    ClientPathTiming,
    HostOverhead,
    busy_timings,
    fit_arrival_delay,
    fit_response_delay,
    fit_under_load,
    window_errors,
)
from powerband.calibration.operator_fit import ModelSteps, PrecisionFit, fit_precision, peak_rates
from powerband.calibration.quality import ReportProgress, better_of_two, is_usable
from powerband.calibration.step_fit import fit_steps, held_out_error
from powerband.cost.measured_steps import MeasuredStepTimes
from powerband.cost.memory import MemoryPlan
from powerband.cost.step_log import RunConfiguration, StepLogRun, StepSample
from powerband.metrics.record import percentile
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.hardware.profile import (
    DeviceProfile,
    Evidence,
    HostModel,
    MeasuredMachine,
    Refinement,
    StepTimeModel,
)
from powerband.spec.settings import EngineSettings
from powerband.spec.workload.arrivals import ClosedLoop
from powerband.spec.workload.lengths import Uniform
from powerband.spec.workload.workload import RequestMix, Workload

if TYPE_CHECKING:
    from powerband.calibration.server import ServedLoad
    from powerband.engine.build import Engine

OwnPrecision = Literal["none", "int8", "int4"]  # precisions that our engine has

PRECISIONS: tuple[OwnPrecision, ...] = ("none", "int8", "int4")
PRECISION_TEXTS: dict[str, str] = {"none": "16 bits", "int8": "int8", "int4": "int4"}
_SHAPES = (  # hidden, MLP, layers, heads, KV heads, head_dim, vocabulary
    (512, 1536, 6, 8, 4, 64, 8192),
    (1024, 3072, 4, 16, 8, 64, 16384),
    (2048, 6144, 3, 16, 8, 128, 32768),
)
_KV_MEMORY = "768MiB"
_USERS = (2, 6, 16, 32)
_REQUESTS_ALONE, _REST_S = 100, 0.05  # a machine that had a rest takes longer to wake up
_MAX_PROMPT_ALONE = 1024
_MAX_PROMPT, _MAX_OUTPUT = 512, 96
_MIN_BAND = 0.05
_MAX_SAMPLES = 2000  # of a log
# Until a model has been served here.
_ASSUMED_HOST = HostModel(
    step_s=3e-4,
    per_request_s=3e-5,
    arrival_s=2e-3,
    answer_s=1e-3,
    overlapped=False,
    evidence=Evidence(source="assumed", error=0.5),
)


@dataclass(frozen=True, slots=True)
class ModelFit:
    """The fit of one model."""

    refinement: Refinement
    steps: int
    errors: FitErrors  # on steps that the fit had not seen
    requests: int


def measure_machine(
    device: str, threads: int | None, budget_s: float, report: ReportProgress, *, force: bool = False
) -> DeviceFits:
    """The laws of this machine's CPU or GPU, from steps of small made-up models within about `budget_s`.

    The profile has no laws of 8 or 4 bits where these are too far off to plan with. force: it has them all.
    """
    fits: list[PrecisionFit] = []
    profile: DeviceProfile | None = None
    precisions = PRECISIONS if device == "cpu" else PRECISIONS[:1]
    for precision in precisions:
        once = partial(_measure_precision, device, threads, precision, budget_s / len(precisions), profile)
        measured, found = better_of_two(once, lambda measured: measured[1].held_out, report)
        fits.append(found)
        if profile is None or force or is_usable(found.held_out):
            profile = measured
    if profile is None:
        raise AssertionError("there is a precision")
    return DeviceFits(profile, tuple(fits))


def _measure_precision(
    device: str,
    threads: int | None,
    precision: OwnPrecision,
    budget_s: float,
    known: DeviceProfile | None,
    report: ReportProgress,
) -> tuple[DeviceProfile, PrecisionFit]:
    """known: with the laws of other precisions; None: this is the first one."""
    measured = _timed(device, threads, precision, budget_s, report)
    report(f"{PRECISION_TEXTS[precision]}: fit", 0.5)
    return fit_precision(known or _facts(measured, threads), [steps for steps, _ in measured])


@dataclass(frozen=True, slots=True)
class DeviceFits:
    profile: DeviceProfile
    fits: tuple[PrecisionFit, ...]


def _timed(
    device: str, threads: int | None, precision: OwnPrecision, budget_s: float, report: ReportProgress
) -> list[tuple[ModelSteps, RunConfiguration]]:
    from powerband.engine.step_benchmark import StepBenchmark, grid

    found = []
    for number, shape in enumerate(_SHAPES):
        name = f"{PRECISION_TEXTS[precision]}: model {number + 1} of {len(_SHAPES)}"
        report(name, 0.0)
        with tempfile.TemporaryDirectory(prefix="powerband-") as folder:
            (Path(folder) / "config.json").write_text(json.dumps(small_llama(*shape)))
            settings = EngineSettings(
                model=folder,
                load_format="dummy",
                quantization=precision,
                device="cpu" if device == "cpu" else "cuda",
                threads=threads,
                kv_cache_memory=_KV_MEMORY,
            )
            with _engine(settings) as engine:
                shapes = grid(engine.memory.max_model_len, 2048, 256)
                samples = StepBenchmark(engine).samples(shapes, budget_s / len(_SHAPES) / 2, partial(report, name))
                form = engine.form
                found.append((ModelSteps(engine.spec, precision, form.kv_precision, tuple(samples)), form))
    return found


def small_llama(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int
) -> dict[str, Any]:
    """A Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "eos_token_id": 0,
    }


@contextmanager
def _engine(settings: EngineSettings) -> Iterator[Engine]:
    from powerband.core.clock import MonotonicClock
    from powerband.engine.build import build_engine
    from powerband.engine.offline.inbox import LocalInbox

    engine = build_engine(settings, inbox=LocalInbox(), clock=MonotonicClock())
    try:
        yield engine
    finally:
        engine.close()


def _facts(measured: Sequence[tuple[ModelSteps, RunConfiguration]], threads: int | None) -> DeviceProfile:
    """What the laws' shares are of: of a GPU in the catalog what stands there, else the most that was reached."""
    cpu, form = detect_cpu(), measured[0][1]
    machine, source = this_machine(form), f"powerband calibrate, {_today()}"
    _, flops = peak_rates([steps for steps, _ in measured])
    on_cpu = form.device == "cpu"
    memory, processors, bandwidth = cpu.memory_bytes, cpu.cores, 0.0
    if on_cpu:
        bandwidth = read_bandwidth_bytes_per_s(threads or cpu.cores)
    else:
        import torch

        from powerband.engine.device_estimates import catalog_device
        from powerband.engine.step_benchmark import copy_bytes_per_s

        known = catalog_device(form.device_name)
        if known is not None:
            return replace(known, name="local", aliases=(), source=source, machine=machine)
        device = torch.device(form.device)
        memory, bandwidth = torch.cuda.mem_get_info(device)[1], copy_bytes_per_s(device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return DeviceProfile(
        name="local",
        kind="cpu" if on_cpu else "cuda",
        architecture="cpu" if on_cpu else "cuda",
        memory_bytes=memory,
        bandwidth_bytes_per_s=bandwidth,
        peak_flops_per_s={"16bit": flops, "float32": flops / 2},
        multiprocessors=processors,
        devices_per_node=1,
        source=source,
        host={"powerband": replace(_ASSUMED_HOST, overlapped=not on_cpu)},
        machine=machine,
    )


def this_machine(form: RunConfiguration) -> MeasuredMachine:
    """As a profile names it."""
    cpu = detect_cpu()
    return MeasuredMachine(
        name=form.device_name,
        features=cpu.features,
        cores=cpu.cores,
        threads=form.threads or cpu.cores,
        date=_today(),
        versions={name: version(name) for name in ("powerband", "torch")},
    )


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


# One model


def measure_model(settings: EngineSettings, budget_s: float, report: ReportProgress) -> ModelFit:
    """Steps of the model alone, then loads over HTTP on its server: what the host adds, and the way to its clients."""
    from powerband.engine.step_benchmark import StepBenchmark, grid

    report(f"{settings.model}: load", 0.0)
    with _engine(settings) as engine:
        limits = engine.scheduler.limits
        shapes = grid(limits.max_model_len, limits.max_num_batched_tokens, limits.max_num_seqs)
        name = f"{settings.model}: steps"
        samples = StepBenchmark(engine).samples(shapes, budget_s / 2, partial(report, name))
        form, max_len, kv_tokens = engine.form, limits.max_model_len, _tokens_written_once(engine.memory)
    with tempfile.TemporaryDirectory(prefix="powerband-") as folder:
        loads, steps = asyncio.run(_serve(settings, Path(folder), max_len, kv_tokens, budget_s / 2, report))
    timings = busy_timings(steps)
    step_model, share = fit_under_load(samples, timings)
    host = replace(host_model(share, loads, steps), overlapped=form.device != "cpu")
    band = max(percentile(window_errors(timings, step_model, share), 90), _MIN_BAND)
    refinement = Refinement(
        model=form.model,
        name=form.name,
        quantization=form.quantization,
        kv_precision=form.kv_precision,
        steps=step_model,
        host=host,
        evidence=Evidence(source=f"steps and loads, {_today()}", error=band),
    )
    return ModelFit(refinement, len(samples), held_out_error(samples), sum(len(load.result.samples) for load in loads))


def _tokens_written_once(memory: MemoryPlan) -> int:
    """As many as write the whole KV cache once. A position takes a part of a page in each group of layers."""
    return memory.num_blocks * memory.block_size // memory.layout.groups


async def _serve(
    settings: EngineSettings, folder: Path, max_len: int, kv_tokens: int, budget_s: float, report: ReportProgress
) -> tuple[list[ServedLoad], list[StepSample]]:
    from powerband.calibration.server import calibration_server

    report(f"{settings.model}: server", 0.0)
    prompts = Uniform(16, max(min(_MAX_PROMPT, max_len // 4), 16))
    answers = Uniform(16, max(min(_MAX_OUTPUT, max_len // 4), 16))
    loads = []
    async with calibration_server(settings.model, serve_options(settings), folder) as served:
        await served.touch(kv_tokens, max(budget_s / 2, 3.0))
        report(f"{settings.model}: 1 user", 0.0)
        wide = Uniform(16, max(min(_MAX_PROMPT_ALONE, max_len // 2), 16))
        alone = Workload(
            name="alone", arrivals=ClosedLoop(1, think_s=_REST_S), requests=RequestMix(wide, Uniform(2, 6))
        )
        # However slow the model is: a request that finds the engine at rest is all that tells of the way to it.
        schedule = alone.draw(0, duration_s=max(budget_s / 3, 10.0), num_requests=_REQUESTS_ALONE)
        loads.append(await served.load(schedule))
        for number, users in enumerate((min(users, settings.max_num_seqs) for users in _USERS), 1):
            report(f"{settings.model}: {users} users", number / (len(_USERS) + 1))
            workload = Workload(name="calibrate", arrivals=ClosedLoop(users), requests=RequestMix(prompts, answers))
            loads.append(await served.load(workload.draw(number, duration_s=budget_s / len(_USERS))))
    began_s = loads[0].start_s
    return loads, [sample for run in served.steps() for sample in run.samples if sample.at_s > began_s]


def serve_options(settings: EngineSettings) -> Mapping[str, object]:
    """The settings that were given, as `powerband serve` takes them."""
    usual = EngineSettings(model=settings.model)
    given = {item.name: getattr(settings, item.name) for item in fields(settings) if item.name != "model"}
    return {name: value for name, value in given.items() if value != getattr(usual, name)}


def host_model(share: HostOverhead, loads: Sequence[ServedLoad], steps: Sequence[StepSample]) -> HostModel:
    """With how far the engine is from its clients. loads: the first one of a single user."""
    per_load = [
        [_client_path(sample, load.start_s) for sample in load.result.samples if sample.chunk_times_s] for load in loads
    ]
    arrival_s, arrival_token_s = fit_arrival_delay(per_load[0], steps, share.step_s)
    answer_s, answer_request_s = fit_response_delay(
        [path_timing for path_timings in per_load for path_timing in path_timings], steps
    )
    return HostModel(
        step_s=share.step_s,
        per_request_s=share.per_request_s,
        per_new_s=share.per_new_s,
        arrival_s=arrival_s,
        arrival_token_s=arrival_token_s,
        answer_s=answer_s,
        answer_request_s=answer_request_s,
        overlapped=False,
        evidence=Evidence(source="loads over HTTP", error=0.3),
    )


def _client_path(sample: Any, start_s: float) -> ClientPathTiming:
    return ClientPathTiming(
        sample.scheduled_s + start_s, tuple(time_s + start_s for time_s in sample.chunk_times_s), sample.prompt_tokens
    )


def with_refinement(profile: DeviceProfile, refinement: Refinement) -> DeviceProfile:
    """In place of an older one of the same model in the same form."""

    def key(of: Refinement) -> tuple[str, ...]:
        return (of.model, of.engine, of.quantization, of.kv_precision)

    others = tuple(known for known in profile.refinements if key(known) != key(refinement))
    return replace(profile, refinements=(*others, refinement))


def fit_step_log(profile: DeviceProfile, run: StepLogRun) -> ModelFit:
    """From a log of real traffic; where it has no steps, the previous fit stands. Raises UsageError for too
    little traffic.
    """
    form, samples = run.form, _thinned(run.samples)
    known = profile.refinement(form.model, "powerband", form.quantization, form.kv_precision)
    if known is not None:
        samples = [*samples, *_assumed_samples(known.steps)]
    step_model = fit_steps(samples)
    errors = held_out_error(samples)
    host = known.host if known is not None else profile.host.get("powerband")
    refinement = Refinement(
        model=form.model,
        name=form.name,
        quantization=form.quantization,
        kv_precision=form.kv_precision,
        steps=step_model,
        host=host,
        evidence=Evidence(source=f"step log, {_today()}", error=max(errors.p90, _MIN_BAND)),
    )
    return ModelFit(refinement, len(run.samples), errors, 0)


def _thinned(samples: Sequence[StepSample]) -> list[StepSample]:
    """Equally spaced ones, at most _MAX_SAMPLES."""
    return list(samples[:: -(-len(samples) // _MAX_SAMPLES)])


def _assumed_samples(step_model: StepTimeModel) -> list[StepSample]:
    """Steps that a law predicts, over its range."""
    from powerband.engine.step_benchmark import grid

    model = MeasuredStepTimes(step_model)
    return [
        StepSample(shape.works, shape.sampled, model.step_s(shape.works, shape.sampled))
        for shape in grid(step_model.tokens[-1], step_model.tokens[-1], step_model.rows[-1])
    ]
