"""From settings to an engine that is ready for its first step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, cast

import torch
from llguidance import LLTokenizer

from powerband.core.admission import SchedulerLimits
from powerband.core.clock import Clock
from powerband.core.kv_cache import KVCacheManager
from powerband.core.loop import EngineCore, Inbox, StepRecord
from powerband.core.policy import make_policy
from powerband.core.scheduler import Scheduler
from powerband.core.step import DeviceReport
from powerband.cost.memory import MemoryPlan, plan_memory
from powerband.cost.precision import auto_dtype
from powerband.cost.sizing import readable
from powerband.cost.step_log import RunConfiguration
from powerband.engine.attention import BackendSelection, choose_backend
from powerband.engine.client.messages import AdapterInfo, EngineInfo
from powerband.engine.device_estimates import DeviceEstimates, find_device_estimates
from powerband.engine.executor.cuda_graphs import MAX_ROWS, can_capture
from powerband.engine.executor.local import ExecutorConfig, Progress, TorchExecutor, device_name
from powerband.engine.grammar_inbox import GrammarInbox
from powerband.engine.kernels.cpu.library import FAST_TIERS, load_with_progress
from powerband.engine.kernels.cpu.library import Status as KernelStatus
from powerband.engine.lora.registry import AdapterRegistry
from powerband.engine.model_loader.generation_config import end_token_ids, sampling_defaults
from powerband.engine.model_loader.weights import resolve_model
from powerband.engine.residuals import Residuals
from powerband.engine.step_log import StepLog
from powerband.errors import EnvironmentFault, UsageError
from powerband.spec.hardware.device import Device, detect_cpu
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.model.reader import converted, read_model_spec
from powerband.spec.settings import EngineSettings
from powerband.structured.compiled import Grammars
from powerband.structured.tokens import grammar_tokens
from powerband.text.tokenizer import Tokenizer

# On a GPU, and where the settings say so, nothing of C++ is loaded.
NO_KERNELS = KernelStatus(None, "not asked for")
# How quantized checkpoints are expanded while loading, by family.
_EXPANDED = {("gpt_oss", "mxfp4")}

# Attention backends that can hold keys and values in 8 bits.
_INT8_CACHES = ("cpu",)


@dataclass(slots=True)
class Engine:
    """A started engine. `core.step()` drives it; `close` ends its threads and files."""

    core: EngineCore
    info: EngineInfo
    spec: ModelSpec
    settings: EngineSettings  # with every "auto" and default that depends on model or machine filled in
    executor: TorchExecutor
    adapters: AdapterRegistry
    scheduler: Scheduler
    memory: MemoryPlan
    form: RunConfiguration
    residuals: Residuals | None  # None: nothing is known of the device
    report: DeviceReport  # its seconds: every phase of the start
    step_log: StepLog | None
    grammars: Grammars
    inbox: GrammarInbox

    def close(self) -> None:
        self.inbox.close()
        self.executor.close()
        if self.step_log is not None:
            self.step_log.close()


def build_engine(settings: EngineSettings, *, inbox: Inbox, clock: Clock, progress: Progress | None = None) -> Engine:
    """Load the model that `settings` name and make everything around it.

    `progress` is called with the name of a phase and the fraction of it that is done. Raises UsageError for settings or
    checkpoints that are wrong, and EnvironmentFault for what this machine lacks, each saying what to do.
    """
    on_progress = progress or (lambda _name, _fraction: None)
    stopwatch = _Stopwatch()
    on_progress("resolve", 0.0)
    folder = resolve_model(settings)
    spec = converted(read_model_spec(folder), settings.convert)
    defaults = sampling_defaults(settings, folder)
    _check_quantization(spec, folder)
    stopwatch.lap("resolve")
    cpu = detect_cpu()
    device = choose_device(settings.device)
    kernels = NO_KERNELS
    if device.type == "cpu":
        torch.set_num_threads(settings.threads or cpu.cores)
        if settings.kernels == "auto":
            on_progress("kernels", 0.0)
            kernels = load_with_progress(partial(on_progress, "kernels"))
    stopwatch.lap("kernels")
    dtype = _dtype(settings, spec, device, cpu, kernels)
    choice = choose_backend(
        settings.attention_backend,
        device.type,
        kernels,
        dtype=getattr(torch, dtype),
        block_size=settings.block_size,
        head_dim=spec.head_dim,
    )
    if spec.encoder is not None:
        choice = BackendSelection("reference", "an encoder attends to whole texts, in plain torch")
    _check_kv_cache(settings, choice)
    memory = _plan(spec, replace(settings, attention_backend=choice.name), device, cpu, dtype)
    stopwatch.lap("plan")
    settings = _resolved(settings, device, dtype, memory)
    form = _form(settings, spec, device, memory)
    step_log = StepLog(Path(settings.step_log), form) if settings.step_log else None
    grammars = Grammars(partial(_grammar_tokens, settings, spec, folder))
    config = _executor_config(settings, spec, folder, device, choice, memory, kernels)
    executor = TorchExecutor(config, on_progress, grammars)
    report = _start(executor, memory, stopwatch, on_progress)
    estimates = find_device_estimates(form, spec, memory)
    scheduler = _scheduler(settings, spec, memory, executor, estimates)
    adapters = _adapters(settings, spec, executor, scheduler, on_progress)
    if settings.lora:
        stopwatch.lap("adapters")
    report = replace(report, seconds=stopwatch.seconds)
    residuals = Residuals(estimates.model) if estimates is not None else None
    gate = GrammarInbox(inbox, grammars)
    core = EngineCore(scheduler, executor, clock, gate, _all_of(step_log, residuals))
    info = _info(settings, spec, folder, defaults, memory, report, choice, kernels, executor, adapters.infos())
    info.refuses_late = estimates is not None
    parts = (executor, adapters, scheduler, memory, form, residuals, report, step_log, grammars, gate)
    return Engine(core, info, spec, settings, *parts)


def _start(executor: TorchExecutor, memory: MemoryPlan, stopwatch: _Stopwatch, on_progress: Progress) -> DeviceReport:
    with _memory_errors(memory):
        report = executor.start()
        stopwatch.take(report.seconds)
        on_progress("kv_cache", 0.0)
        executor.init_kv_cache(memory.num_blocks)
    stopwatch.lap("kv_cache")
    return report


def _adapters(
    settings: EngineSettings, spec: ModelSpec, executor: TorchExecutor, scheduler: Scheduler, on_progress: Progress
) -> AdapterRegistry:
    """The settings' adapters, loaded. Raises as `AdapterRegistry.load`."""
    held, device = executor.runner.adapters, executor.config.device
    registry = AdapterRegistry(
        spec,
        settings,
        held,
        device,
        kernels=executor.config.kernels,
        in_use=lambda: {r.adapter for r in scheduler.requests.values()},
    )
    for name, source in settings.adapters().items():
        on_progress("adapters", len(registry.infos()) / len(settings.lora))
        registry.load(name, source)
    return registry


def _grammar_tokens(settings: EngineSettings, spec: ModelSpec, folder: Path) -> LLTokenizer:
    """The tokenizer for grammars. Raises EnvironmentFault, and InvalidRequest where there are none with it."""
    tokenizer = Tokenizer.load(settings.tokenizer or folder, revision=None if settings.tokenizer else settings.revision)
    if tokenizer is None:
        raise EnvironmentFault("Structured output needs a tokenizer, and the model has none.", code="no_tokenizer")
    ends = end_token_ids(settings, folder, spec.eos_token_ids, spec.vocab_size)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return grammar_tokens(tokenizer.to_json(), spec.vocab_size, ends)


def choose_device(asked: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Raises EnvironmentFault when a GPU is asked for that torch cannot use."""
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EnvironmentFault(
            f"device is 'cuda', but torch {torch.__version__} can use no GPU here.",
            hint="'powerband doctor' says what is missing; without a GPU leave --device out.",
            param="device",
        )
    return torch.device("cuda", torch.cuda.current_device())


def _dtype(settings: EngineSettings, spec: ModelSpec, device: torch.device, cpu: Device, kernels: KernelStatus) -> str:
    if settings.dtype != "auto":
        return settings.dtype
    kind: Literal["cpu", "cuda"] = "cpu" if device.type == "cpu" else "cuda"
    has_kernels = kernels.tier in FAST_TIERS
    return auto_dtype(spec, kind, cpu.features, kernels=has_kernels, quantization=settings.quantization)


def _plan(spec: ModelSpec, settings: EngineSettings, device: torch.device, cpu: Device, dtype: str) -> MemoryPlan:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return plan_memory(spec, settings, total, kind="cuda", free_memory_bytes=free, dtype=dtype)
    free = cpu.available_memory_bytes
    return plan_memory(spec, settings, cpu.memory_bytes, kind="cpu", free_memory_bytes=free, dtype=dtype)


def _check_quantization(spec: ModelSpec, folder: Path) -> None:
    if (
        spec.weight_format is None
        and spec.quantization is not None
        and (spec.family, spec.quantization) not in _EXPANDED
    ):
        raise UsageError(
            f"{folder} is quantized with '{spec.quantization}', which cannot be loaded.",
            hint="Use the model's version in 16 bits.",
            code="unsupported_quantization",
            param="model",
        )


def _check_kv_cache(settings: EngineSettings, choice: BackendSelection) -> None:
    if settings.kv_cache_dtype == "int8" and choice.name not in _INT8_CACHES:
        raise UsageError(
            f"kv_cache_dtype is 'int8', which attention by '{choice.name}' ({choice.reason}) cannot hold.",
            hint="Leave it out.",
            param="kv_cache_dtype",
        )


def _resolved(settings: EngineSettings, device: torch.device, dtype: str, memory: MemoryPlan) -> EngineSettings:
    overlap = settings.async_scheduling
    return replace(
        settings,
        dtype=cast("Literal['float32', 'float16', 'bfloat16']", dtype),
        device="cuda" if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads() if device.type == "cpu" else settings.threads,
        max_model_len=memory.max_model_len,
        async_scheduling=device.type == "cuda" if overlap is None else overlap,
    )


def _executor_config(
    settings: EngineSettings,
    spec: ModelSpec,
    folder: Path,
    device: torch.device,
    choice: BackendSelection,
    memory: MemoryPlan,
    kernels: KernelStatus,
) -> ExecutorConfig:
    return ExecutorConfig(
        spec=spec,
        folder=folder,
        load_format=settings.load_format,
        device=device,
        dtype=getattr(torch, settings.dtype),
        kv_dtype=getattr(torch, memory.kv_dtype),
        max_model_len=settings.max_model_len or spec.max_position,
        block_size=settings.block_size,
        seed=settings.seed,
        attention=choice,
        kernels=kernels.tier is not None,
        overlap=bool(settings.async_scheduling),
        held=memory.held,
        weight_cache=settings.weight_cache == "auto",
        adapters=settings.adapter_slots > 0,
        layout=memory.layout,
        graph_rows=graph_rows(settings, device, choice),
    )


def graph_rows(settings: EngineSettings, device: torch.device, choice: BackendSelection) -> int:
    """The largest batch of decodes that CUDA graphs are captured for; 0: none are."""
    captures = device.type == "cuda" and not settings.enforce_eager and can_capture(choice.name)
    return min(settings.max_num_seqs, MAX_ROWS) if captures else 0


def _form(settings: EngineSettings, spec: ModelSpec, device: torch.device, memory: MemoryPlan) -> RunConfiguration:
    """What runs, for the step log and for finding a profile of it."""
    return RunConfiguration(
        model=spec.shape_digest,
        name=settings.served_model_name or settings.model,
        dtype=settings.dtype,
        quantization=memory.held.layers,
        kv_dtype=memory.kv_dtype,
        device=str(device),
        device_name=device_name(device),
        threads=settings.threads,
        powerband=version("powerband"),
    )


def _all_of(*observers: Callable[[StepRecord], None] | None) -> Callable[[StepRecord], None] | None:
    """One observer for those that there are."""
    listed = [observer for observer in observers if observer is not None]
    if len(listed) <= 1:
        return listed[0] if listed else None

    def observe(record: StepRecord) -> None:
        for observer in listed:
            observer(record)

    return observe


def _scheduler(
    settings: EngineSettings,
    spec: ModelSpec,
    memory: MemoryPlan,
    executor: TorchExecutor,
    estimates: DeviceEstimates | None,
) -> Scheduler:
    kv = KVCacheManager(
        memory.num_blocks,
        settings.block_size,
        prefix_caching=settings.enable_prefix_caching and spec.encoder is None,
        layout=memory.layout if memory.layout.windowed else None,
    )
    limits = SchedulerLimits(
        max_model_len=memory.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        long_prefill_token_threshold=settings.long_prefill_token_threshold,
        max_num_queued_reqs=settings.max_num_queued_reqs,
        max_num_queued_tokens=settings.max_num_queued_tokens,
    )
    estimate_s = estimates.first_token(settings.max_num_batched_tokens) if estimates is not None else None
    policy = make_policy(settings.scheduling_policy, kv)
    return Scheduler(
        kv,
        limits,
        policy=policy,
        relay=executor.relay,
        estimate_s=estimate_s,
        rope=spec.length_rope,
        whole_prompts=spec.encoder is not None,
        pools_every_position=spec.pooling is not None and spec.pooling.needs_every_position,
    )


def _info(
    settings: EngineSettings,
    spec: ModelSpec,
    folder: Path,
    defaults: dict[str, float | int],
    memory: MemoryPlan,
    report: DeviceReport,
    choice: BackendSelection,
    kernels: KernelStatus,
    executor: TorchExecutor,
    adapters: list[AdapterInfo],
) -> EngineInfo:
    measured = {"weights": report.weights_bytes, "adapters": sum(one.memory_bytes for one in adapters)}
    if (resident := _resident_bytes(executor.config.device)) is not None:
        measured["total"] = resident
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.seconds.items())
    sampling = ", ".join(f"{name} {value:g}" for name, value in defaults.items()) or "temperature 1"
    products = ", ".join(f"{name} ({count})" for name, count in executor.providers.items()) or "torch"
    summary = "\n".join(
        [
            f"model      {settings.model} ({spec.family}, {spec.num_layers} layers, {', '.join(memory.precisions())})",
            f"device     {report.device} ({report.device_name})",
            f"attention  {choice.name}: {choice.reason}",
            f"kernels    {kernels.tier or 'none'}: {kernels.reason}",
            f"products   {products}",
            memory.table(measured),
            f"KV cache   {memory.kv_tokens} tokens, requests of up to {memory.max_model_len}",
            f"sampling   {sampling}, unless a request sets others",
            f"start      {phases}",
        ]
    )
    return EngineInfo(
        model_folder=str(folder),
        max_model_len=memory.max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=end_token_ids(settings, folder, spec.eos_token_ids, spec.vocab_size),
        sampling_defaults=defaults,
        kv_capacity_tokens=memory.kv_tokens,
        device=report.device,
        dtype=settings.dtype,
        summary=summary,
        config=asdict(settings),
        adapters=adapters,
        generates=spec.generates,
        pooling=spec.pooling,
    )


class _Stopwatch:
    """Seconds per phase, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last_s = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last_s
        self._last_s = now

    def take(self, measured: dict[str, float]) -> None:
        """Add phases that were timed elsewhere, up to now."""
        self.seconds |= measured
        self._last_s = time.perf_counter()


@contextmanager
def _memory_errors(memory: MemoryPlan) -> Iterator[None]:
    """On an out-of-memory error despite the plan: report what was planned and what would take less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as problem:
        is_typed = isinstance(problem, torch.OutOfMemoryError | MemoryError)
        if not is_typed and "allocate memory" not in str(problem):
            raise
        raise _out_of_memory(memory, problem) from problem


def _out_of_memory(memory: MemoryPlan, problem: BaseException) -> EnvironmentFault:
    half_kv = memory.parts["kv_cache"] // 2
    fewer_tokens = max(memory.max_num_batched_tokens // 4, 1)
    ways = [
        f"--kv-cache-memory {max(half_kv >> 20, 1)}MiB frees {readable(half_kv)}",
        f"--max-num-batched-tokens {fewer_tokens} frees up to {readable(memory.parts['activations'] * 3 // 4)}",
        f"--dtype bfloat16 frees {readable((memory.parts['weights'] + memory.parts['kv_cache']) // 2)}"
        if memory.dtype == "float32"
        else "end other programs that use this device's memory",
    ]
    return EnvironmentFault(
        f"Out of memory while loading: {str(problem).splitlines()[0][:200]}\n{memory.table()}",
        hint="Do one of: " + "; ".join(f"({i}) {way}" for i, way in enumerate(ways, 1)) + ".",
        code="out_of_memory",
    )


def _resident_bytes(device: torch.device) -> int | None:
    """Memory in use now: of the GPU by torch, or of this process. None where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
