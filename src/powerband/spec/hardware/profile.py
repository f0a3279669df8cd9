"""What a device is, and how much of it software reaches: facts from datasheets, prices, and coefficients of laws.

    facts         memory, bandwidth, peaks, links: what the maker prints
    coefficients  of the performance models in cost/operator_models.py, by engine and precision; each with its source
                  and the error of its fit

A profile is one YAML file: in the catalog (spec/hardware/devices), written by `powerband calibrate`, or by hand. What a
file leaves out comes from the defaults of its architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from powerband.errors import UsageError
from powerband.spec.deployment import EngineName, KVPrecision, Quantization
from powerband.spec.yaml_codec import as_record, read_record

DeviceKind = Literal["cpu", "cuda", "rocm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePrice:
    """usd_per_hour: of a whole machine with `devices` devices, without commitment."""

    usd_per_hour: float
    devices: int = 1
    where: str  # cloud and type of machine: 'aws g6.xlarge'
    source: str
    date: str = ""
    confidence: Literal["high", "medium", "low", "user"] = "medium"

    @property
    def providers(self) -> tuple[str, ...]:
        """The clouds in `where`, in lower case: 'lambda/runpod B200' → lambda, runpod."""
        return tuple(self.where.split(" ")[0].lower().split("/"))

    @property
    def origin(self) -> str:
        """Where the price was found, and when: 'list price, from memory; 2025'."""
        doubt = "low confidence" if self.confidence == "low" else ""
        return "; ".join(part for part in (self.source, self.date, doubt) if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLink:
    """Between devices of a node, or between a device and its host. bytes_per_s: in one direction, as printed."""

    name: str  # nvlink, pcie3 … pcie5, xgmi
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Where coefficients come from. error: that nine measurements in ten lie within, as a share (0.2: ±20 %)."""

    source: str
    error: float

    @property
    def is_prior(self) -> bool:
        """Whether the coefficients are those of a relative: nothing was measured on such a device."""
        return self.source.startswith("prior")


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmModel:
    """t = overhead + quantize + (Tc^p + Tm^p)^(1/p), see cost/operator_models.py. Seconds, fractions of the peak."""

    compute_share: float  # of the peak of the precision's own dtype
    memory_share: float  # of the memory's bandwidth
    overhead_s: float
    sharpness: float = 2.0  # p: how sharply compute and memory time meet; large: the larger of them
    fill: float = 0.0  # how many tiles, per multiprocessor, it takes to fill the device; 0: any number does
    extra_bytes: float = 0.0
    quantize_s: float = 0.0  # finding scales of activations at run time
    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionModel:
    """Of one layer. compute_share: of the 16-bit peak, for prefills. memory_share: of the bandwidth, for decodes."""

    compute_share: float
    memory_share: float
    prefill_overhead_s: float
    decode_overhead_s: float
    fill: float = 0.0
    extra_bytes: float = 0.0
    prefill_memory_share: float = 0.0  # of the bandwidth, for prefills' queries, keys and values; 0: as for decodes
    mixed_factor: float = 1.0  # on decodes that share their call with a prefill's chunk: 1: they are none the slower
    prefill_evidence: Evidence
    decode_evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementwiseModel:
    """Norms, rotary, activations, residuals: t = kernel_s for each kernel + bytes / (memory_share · bandwidth)."""

    kernel_s: float
    memory_share: float
    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkModel:
    """t = latency + factor · bytes / bytes_per_s, for collectives of `ranks` devices (2, 4, 8 …) or one transfer.

    Small sums are quicker when every rank sends all it has to all others: the lesser of both is taken.
    """

    latency_s: float
    bytes_per_s: float
    direct_latency_s: float = 0.0
    direct_bytes_per_s: float = 0.0  # 0: never so
    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class HostModel:
    """What the host adds. step = device + its work, or their maximum if overlapped.

    Its work: step_s + per_request_s · requests in the step + per_new_s · those of them that are new.
    """

    step_s: float
    per_request_s: float
    per_new_s: float = 0.0
    arrival_s: float  # from a request's arrival until the engine knows it: HTTP, chat template, tokens
    arrival_token_s: float = 0.0  # more, for each token of its prompt
    front_s: float = 0.0  # of these, in which it takes no other request
    answer_s: float  # from a step's result until its tokens are at the client
    answer_request_s: float = 0.0  # more, for each request in the step
    layer_s: float = 0.0  # of each layer in each step: launches
    overlapped: bool = True
    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredMachine:
    """The machine that a profile was measured on: of another one it says nothing."""

    name: str  # of the processor or GPU
    features: tuple[str, ...] = ()
    cores: int
    threads: int
    date: str
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeModel:
    """What steps of one model take on one device, fitted to steps of it; cost.measured_steps evaluates it. Seconds.

    token_s[i]: of a step of tokens[i] tokens, without its attention and head; row_s[i]: of rows[i] sampled rows.
    Between two, and beyond the last, on straight lines.
    """

    tokens: tuple[int, ...]
    token_s: tuple[float, ...]
    rows: tuple[int, ...]
    row_s: tuple[float, ...]
    # attention, of all layers together
    positions: tuple[int, ...]  # that the decodes of a step read: the more, the fewer of them are in a cache
    position_s: tuple[float, ...]  # of decodes that read so many
    decode_s: float  # of each of them
    chunk_s: float  # of each prefill chunk
    pair_s: float  # of each token and position that it sees
    read_s: float  # of each position that a chunk reads
    # How much longer than that steps take, as equally many measured ones did, from the shortest on: of steps of decodes
    # only, and of those with chunks. The fit is below nearly all. Empty: never.
    decode_spread_s: tuple[float, ...] = ()
    chunk_spread_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """One model in one form on one engine: instead of the device's laws."""

    model: str  # ModelSpec.shape_digest
    name: str  # as the model was called
    engine: EngineName = "powerband"
    quantization: Quantization = "none"
    kv_precision: KVPrecision = "16bit"
    steps: StepTimeModel
    host: HostModel | None = None  # None: the device's
    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """One kind of device. Sizes in bytes, rates per second."""

    name: str
    kind: DeviceKind
    architecture: str  # turing, ampere, ada, hopper, blackwell, cdna3, cpu
    memory_bytes: int  # that software sees
    bandwidth_bytes_per_s: float
    peak_flops_per_s: Mapping[str, float]  # dense, by dtype: float32, 16bit, fp8, int8, fp4
    multiprocessors: int  # cores of a CPU
    l2_bytes: int = 0
    link: DeviceLink | None = None  # between devices; None: through the host
    host_link: DeviceLink | None = None  # None: the device is the host
    devices_per_node: int = 8
    watts: float | None = None
    prices: tuple[DevicePrice, ...] = ()
    aliases: tuple[str, ...] = ()
    source: str = ""
    # Laws. Keys: '*' or an engine's name, then the precision (spec.deployment.Quantization, KVPrecision) or the number
    # of ranks. What an engine has no entry for is looked up under '*'.
    gemm: Mapping[str, Mapping[str, GemmModel]] = field(default_factory=dict)
    experts: Mapping[str, Mapping[str, GemmModel]] = field(default_factory=dict)  # a layer's experts in one product
    attention: Mapping[str, Mapping[str, AttentionModel]] = field(default_factory=dict)
    elementwise: Mapping[str, ElementwiseModel] = field(default_factory=dict)  # by engine
    all_reduce: Mapping[str, Mapping[int, LinkModel]] = field(default_factory=dict)
    transfer: LinkModel | None = None  # between two devices, for pipeline stages
    host_transfer: LinkModel | None = None  # from the host's memory, for offloaded weights
    host: Mapping[str, HostModel] = field(default_factory=dict)  # by engine
    machine: MeasuredMachine | None = None  # None: not measured on one
    refinements: tuple[Refinement, ...] = ()

    @property
    def threads(self) -> int:
        """CPU threads of an engine for which it holds; of a GPU 0."""
        return self.machine.threads if self.kind == "cpu" and self.machine is not None else 0

    def refinement(
        self, model: str, engine: EngineName, quantization: Quantization, kv_precision: KVPrecision
    ) -> Refinement | None:
        """Of a model, by its shape_digest, in this form; None: it was not measured."""
        wanted = (model, engine, quantization, kv_precision)
        found = (r for r in self.refinements if (r.model, r.engine, r.quantization, r.kv_precision) == wanted)
        return next(found, None)

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "bandwidth_bytes_per_s", "multiprocessors", "devices_per_node"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{self.name}: {name} must be above 0.", param=name)
        if not self.peak_flops_per_s or min(self.peak_flops_per_s.values()) <= 0:
            raise UsageError(
                f"{self.name}: peak_flops_per_s must name a rate above 0 for each dtype.",
                hint="Like: peak_flops_per_s: {16bit: 121.0e+12, fp8: 242.0e+12}.",
                param="peak_flops_per_s",
            )

    @classmethod
    def from_dict(cls, values: object, where: str = "device") -> DeviceProfile:
        """Facts and laws as a file holds them. Raises UsageError for what is unknown, missing or wrong."""
        return read_record(cls, values, where)

    def as_dict(self) -> dict[str, Any]:
        """What `from_dict` reads; what has its default is left out."""
        values: dict[str, Any] = as_record(self)
        return values
