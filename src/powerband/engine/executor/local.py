"""An executor in this process: one device, one model runner."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from powerband.core.step import DeviceReport, Step, StepResult
from powerband.engine.attention import AttentionShape, BackendSelection, make_backend
from powerband.engine.attention.cpu import CpuAttention
from powerband.engine.executor.cuda_graphs import DecodeGraphs
from powerband.engine.executor.runner import ModelRunner
from powerband.engine.executor.warm_up import warm_up
from powerband.engine.layers.cpu import use_cpu_layers
from powerband.engine.lora.targets import adaptable_parts
from powerband.engine.model_loader.linear_methods import LinearMethodSelector
from powerband.engine.model_loader.weight_cache import WeightCache
from powerband.engine.model_loader.weights import fill_random, load_weights
from powerband.engine.models.cpu import use_cpu_blocks
from powerband.engine.models.decoder import Decoder
from powerband.engine.models.encoder import Encoder
from powerband.engine.models.registry import Model
from powerband.engine.pooling.loader import load_pooler, random_pooler
from powerband.engine.pooling.pooler import Pooler
from powerband.engine.sampling.cpu import use_cpu_sampling
from powerband.engine.sampling.sampler import Sampler
from powerband.errors import UsageError
from powerband.spec.checkpoint.quantization import PLAIN, WeightPrecisions
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.kv_layout import KVLayout
from powerband.spec.model.model_spec import ModelSpec
from powerband.structured.compiled import Grammars

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorConfig:
    """What one device is to run. `overlap`: two steps in flight."""

    spec: ModelSpec
    folder: Path
    load_format: Literal["auto", "dummy"]
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    max_model_len: int
    block_size: int
    seed: int
    attention: BackendSelection
    kernels: bool  # the C++ kernels for CPUs are loaded
    overlap: bool
    held: WeightPrecisions = PLAIN  # what projections and head are held in
    weight_cache: bool = False  # keep quantized weights for the next start
    adapters: bool = False  # LoRA adapters may be loaded
    layout: KVLayout | None = None  # of a model with sliding windows
    graph_rows: int = 0  # largest batch of decodes to capture CUDA graphs for; 0: none


class TorchExecutor:
    """core.step.Executor on one device. Call `start`, then `init_kv_cache`, then `submit`.

    A GPU runs beside the caller by itself; on a CPU overlapping steps run in a worker thread, so that the caller
    schedules and updates meanwhile.
    """

    def __init__(
        self, config: ExecutorConfig, progress: Progress | None = None, grammars: Grammars | None = None
    ) -> None:
        """grammars: of structured output; None where the model has no tokenizer."""
        self.config = config
        self._grammars = grammars
        self.depth = 2 if config.overlap else 1
        self.relay = 1 if config.overlap else 0
        self.providers: dict[str, int] = {}  # projections by who computes them
        self.attention = make_backend(config.attention, config.block_size, config.device)
        self._progress = progress or (lambda _name, _fraction: None)
        self._runner: ModelRunner | None = None
        self._weight_cache: WeightCache | None = None
        threaded = config.overlap and config.device.type == "cpu"
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="powerband-steps") if threaded else None

    @property
    def runner(self) -> ModelRunner:
        if self._runner is None:
            raise UsageError("The executor has not been started.")
        return self._runner

    @property
    def _layout(self) -> KVLayout:
        return self.config.layout or KVLayout(self.config.block_size, self.config.spec.num_layers)

    @torch.inference_mode()
    def start(self) -> DeviceReport:
        """Take memory for the weights and load them. Raises as `load_weights` does."""
        config = self.config
        began_s = time.perf_counter()
        self._progress("load", 0.0)
        model = self._empty_model()
        selector = LinearMethodSelector(model, config.held, kernels=config.kernels)
        weights_bytes = self._load(selector)
        loaded_s = time.perf_counter()
        self._progress("prepare", 0.0)
        self.providers = dict(selector.counts)
        sampler = Sampler(config.spec.vocab_size, config.device, config.seed)
        if config.kernels:
            use_cpu_layers(model)
            use_cpu_sampling(sampler)
        if config.attention.name == "triton" and isinstance(model, Decoder):
            from powerband.engine.layers.triton import use_fused_layers  # Triton is not everywhere

            use_fused_layers(model)
        if config.adapters:
            if not isinstance(model, Decoder):
                raise UsageError(
                    "Encoders take no LoRA adapters.", hint="Leave --lora and --max-loras out.", param="lora"
                )
            for name, part in adaptable_parts(model).items():
                part.use_adapters(model.adapters, name)
        self._runner = ModelRunner(
            model,
            self.attention,
            sampler,
            self._pooler(),
            block_size=config.block_size,
            device=config.device,
            groups=self._layout.groups,
            grammars=self._grammars,
        )
        prepared_s = time.perf_counter()
        return DeviceReport(
            device=str(config.device),
            device_name=device_name(config.device),
            weights_bytes=weights_bytes,
            seconds={"load": loaded_s - began_s, "prepare": prepared_s - loaded_s},
        )

    def _load(self, selector: LinearMethodSelector) -> int:
        """Load from the weight cache where possible, else from the checkpoint. Returns the weights' bytes."""
        config = self.config
        if config.load_format == "dummy":
            return fill_random(selector, config.seed)
        progress = functools.partial(self._progress, "load")
        if not (config.weight_cache and config.kernels and config.held != PLAIN):
            return load_weights(selector, config.folder, progress)
        cache = WeightCache(selector, config.folder)
        weights_bytes = load_weights(selector, config.folder, progress, cache.read(selector))
        cache.write(selector)
        self._weight_cache = cache
        return weights_bytes

    def _empty_model(self) -> Model:
        config, spec = self.config, self.config.spec
        if spec.encoder is not None:
            return Encoder(spec, spec.encoder, dtype=config.dtype, device=config.device)
        return Decoder(spec, max_positions=config.max_model_len, dtype=config.dtype, device=config.device)

    def _pooler(self) -> Pooler | None:
        config, pooling = self.config, self.config.spec.pooling
        if pooling is None:
            return None
        if config.load_format == "dummy":
            return random_pooler(pooling, config.seed, config.device)
        return load_pooler(pooling, config.folder, config.device)

    @torch.inference_mode()
    def init_kv_cache(self, num_blocks: int) -> None:
        spec, model = self.config.spec, self.runner.model
        if isinstance(model, Encoder):  # it keeps nothing
            return
        shape = AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.attention_scale)
        layout = self._layout
        places = layout.places(spec.layers)
        self.attention.allocate(layout.group_layers, num_blocks, shape, self.config.kv_dtype, places)
        if isinstance(self.attention, CpuAttention):
            use_cpu_blocks(model, self.attention)
        if self.attention.name == "triton":
            self._progress("compile", 0.0)
            config = self.config
            warm_up(
                self.runner.forward,
                max_model_len=config.max_model_len,
                block_size=config.block_size,
                groups=layout.groups,
                device=config.device,
            )
        if self.config.graph_rows:
            self._capture_graphs(model)

    def _capture_graphs(self, model: Decoder) -> None:
        config = self.config
        graphs = DecodeGraphs(
            model,
            self.attention,
            max_rows=config.graph_rows,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            groups=self._layout.groups,
            device=config.device,
        )
        graphs.capture(lambda fraction: self._progress("graphs", fraction))
        self.runner.forward = graphs

    def submit(self, step: Step) -> Handle:
        if self._worker is not None:
            return Handle(self._worker.submit(self._run, step).result)
        if self.config.device.type == "cpu":
            return Handle(lambda: self._run(step))
        return Handle(self.runner.launch(step).result)

    def check(self) -> None:
        """A CPU does not fail; a GPU that has failed raises an error when it is synchronised."""
        if self.config.device.type == "cuda":
            torch.cuda.synchronize(self.config.device)

    def close(self) -> None:
        """Wait for the steps in flight and end the threads."""
        if self._weight_cache is not None:
            self._weight_cache.close()
        if self._worker is not None:
            self._worker.shutdown(wait=True)
        if self._runner is not None:
            self._runner.close()

    def _run(self, step: Step) -> StepResult:
        return self.runner.launch(step).result()


class Handle:
    """core.step.StepHandle around whatever waits for a step."""

    def __init__(self, wait: Callable[[], StepResult]) -> None:
        self._wait = wait

    def result(self) -> StepResult:
        return self._wait()


def device_name(device: torch.device) -> str:
    """The manufacturer's name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return detect_cpu().name
