"""LatencyModel: the seconds of any step of a replica, by operator and by what binds, from a device's profile.

step_s = projections + experts + norms and activations + attention + head + sampling
       + collectives (TP) + transfers (PP) + what streaming of offloaded weights and launches are not hidden by
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from typing import NamedTuple, TypeVar

from powerband.cost import operator_models as laws
from powerband.cost.engine_priors import ENGINE_PRIORS
from powerband.cost.measured_steps import MeasuredStepTimes
from powerband.cost.operator_models import DeviceSpeed
from powerband.cost.shapes import FORMATS, PLAIN, GemmFormat, GemmShape, RankShapes
from powerband.errors import UsageError
from powerband.spec.deployment import EngineName, Quantization, Replica
from powerband.spec.hardware import architecture_defaults as priors
from powerband.spec.hardware.profile import DeviceProfile, Evidence, GemmModel, HostModel, Refinement
from powerband.spec.model.model_spec import ModelSpec

OPERATORS = (
    "projections",
    "head",
    "attention prefill",
    "attention decode",
    "norms and activations",
    "experts",
    "collectives",
    "transfers",
    "streaming",
    "sampling",
    "launches",
)
BOUNDS = ("bandwidth", "compute", "link", "host")

# What no law sees: clocks under sustained load, gaps between kernels, versions of engines. With it, nine in ten of the
# end-to-end measurements lie inside the band (make accuracy: closed loop and saturation together).
_UNSEEN = 0.15
_UNMEASURED = 0.4  # the same of an engine of which nothing has been measured on such a device
_SAMPLING_S = 20e-6
_SAMPLING_BYTES = 8.0  # moved for each logit: read in 16 bits, held in 32

Work = tuple[int, int]  # new tokens of a request, its context after them
Model = TypeVar("Model")
Key = TypeVar("Key")


class OperatorTime(NamedTuple):
    operator: str
    bound: str
    seconds: float


class LatencyModel:
    """Seconds of a step. Keeps what it has computed for a number of tokens, so that the next such step is quick.

    Raises UsageError for a precision that the device cannot compute in and for heads that ranks cannot share.
    """

    def __init__(
        self,
        spec: ModelSpec,
        profile: DeviceProfile,
        replica: Replica,
        engine: EngineName,
        *,
        constrained: bool = False,
    ) -> None:
        """constrained: every answer has a grammar (Workload.constrains_answers)."""
        self._profile, self._replica, self._engine = profile, replica, engine
        self._assumed = assumed = ENGINE_PRIORS[engine]
        self._shapes = RankShapes.of(spec, replica)
        self._hidden, self._vocab, self._chosen = spec.hidden_size, spec.vocab_size, spec.num_experts_per_token
        self.num_stages = replica.pipeline_parallel
        refined = _refinement(spec, profile, replica, engine)
        own_host = refined.host if refined is not None else None
        host = own_host or profile.host.get(engine) or assumed.host
        self.host: HostModel = assumed.host_with_grammars(host, is_cpu=profile.kind == "cpu") if constrained else host
        self._measured = MeasuredStepTimes(refined.steps) if refined is not None else None
        self._measured_error = refined.evidence.error if refined is not None else 0.0
        expert_format: Quantization = replica.quantization
        plain: Quantization = "none" if replica.quantization == "mxfp4" else replica.quantization
        self._matrix, self._plain = self._product(plain), self._product("none")
        has_int8_head = assumed.quantizes_head and plain in ("int8", "int4")
        self._head = self._product("int8") if has_int8_head else self._plain
        self._expert_model = _operator_model(profile.experts, engine, expert_format) or priors.experts_model(
            profile, expert_format
        )
        self._expert_format = FORMATS[expert_format]
        self._expert_speed = self._speed(self._expert_format)
        attention = _operator_model(profile.attention, engine, replica.kv_precision)
        self._attention = attention or priors.attention_model(profile, replica.kv_precision)
        self._attention_speed = self._speed(PLAIN)
        self._elementwise = (
            profile.elementwise.get(engine) or profile.elementwise.get("*") or priors.elementwise_model(profile)
        )
        ranks = replica.tensor_parallel
        self._all_reduce = _operator_model(profile.all_reduce, engine, ranks) or priors.all_reduce_model(profile, ranks)
        self._transfer = profile.transfer or priors.transfer_model(profile)
        self._stream_s = self._streaming()
        self._graphs = assumed.graph_sizes if profile.kind != "cpu" else ()
        self._max_decode_tokens = 1 + replica.draft_tokens
        self._by_tokens: dict[int, float] = {}
        self._by_rows: dict[int, float] = {}

    def step_s(self, works: Sequence[tuple[int, int]], sampled: int) -> float:
        """Device seconds of one step, all stages together. works: (new tokens, context after them) of each request."""
        if self._measured is not None:
            return self._measured.step_s(works, sampled)
        if self._assumed.separates_decodes:
            return sum(self._pass_s(part, rows) for part, rows in self._passes(works, sampled))
        return self._pass_s(works, sampled)

    def _pass_s(self, works: Sequence[Work], sampled: int) -> float:
        tokens, decodes = self._tokens(works)
        seconds = self._by_tokens.get(tokens)
        if seconds is None:
            seconds = self._by_tokens[tokens] = sum(item.seconds for item in self._token_items(tokens))
        for item in self._attention_items(works):
            seconds += item.seconds
        seconds += self._uncovered(seconds, tokens, decodes)
        rows = self._by_rows.get(sampled)
        if rows is None:
            rows = self._by_rows[sampled] = sum(item.seconds for item in self._head_items(sampled))
        return seconds + rows

    def parts(self, works: Sequence[tuple[int, int]], sampled: int) -> dict[str, float]:
        """The same seconds by operator."""
        found = dict.fromkeys(OPERATORS, 0.0)
        if self._measured is not None:
            return found | self._measured.parts(works, sampled)
        for part, rows in self._passes(works, sampled):
            for item in self._items(part, rows):
                found[item.operator] += item.seconds
        return found

    def bounds(self, works: Sequence[tuple[int, int]], sampled: int) -> dict[str, float]:
        """The same seconds by what binds. Of measured steps: in the proportions of the laws."""
        found = dict.fromkeys(BOUNDS, 0.0)
        for part, rows in self._passes(works, sampled):
            for item in self._items(part, rows):
                found[item.bound] += item.seconds
        if self._measured is not None:
            scale = self._measured.step_s(works, sampled) / sum(found.values())
            return {name: seconds * scale for name, seconds in found.items()}
        return found

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """Of what takes most of a step's time: products and attention."""
        return self._matrix[0].evidence, self._attention.prefill_evidence, self._attention.decode_evidence

    @property
    def band(self) -> float:
        """Nine steps in ten lie within ± this share: errors of the laws by their part of usual steps."""
        if self._measured is not None:
            return self._measured_error
        context = max(min(2048, self._replica.max_model_len) // 2, 1)
        steps: list[tuple[list[tuple[int, int]], int]] = [([(1, context)] * 16, 16), ([(context, context)], 1)]
        return max(self._band(works, rows) for works, rows in steps)

    def _band(self, works: Sequence[tuple[int, int]], sampled: int) -> float:
        parts = self.parts(works, sampled)
        errors = {
            "projections": self._matrix[0].evidence.error,
            "head": self._head[0].evidence.error,
            "attention prefill": self._attention.prefill_evidence.error,
            "attention decode": self._attention.decode_evidence.error,
            "norms and activations": self._elementwise.evidence.error,
            "experts": self._expert_model.evidence.error,
            "collectives": self._all_reduce.evidence.error,
            "transfers": self._transfer.evidence.error,
            "streaming": 0.2,
            "sampling": 0.5,
            "launches": self.host.evidence.error,
        }
        total = sum(parts.values())
        is_measured = self._profile.kind == "cpu" or self._engine in self._profile.gemm
        unseen = _UNSEEN if is_measured or self._assumed.is_measured_on_gpus else _UNMEASURED
        return sqrt(unseen**2 + sum((errors[name] * seconds / total) ** 2 for name, seconds in parts.items()))

    def _passes(self, works: Sequence[Work], sampled: int) -> list[tuple[Sequence[Work], int]]:
        """What a step computes one after the other: all at once, or chunks of prefills and then decodes."""
        decodes = (
            [work for work in works if work[0] <= self._max_decode_tokens] if self._assumed.separates_decodes else []
        )
        if not decodes or len(decodes) == len(works):
            return [(works, sampled)]
        rows = min(sampled, sum(new for new, _ in decodes))
        return [([work for work in works if work[0] > self._max_decode_tokens], sampled - rows), (decodes, rows)]

    def _items(self, works: Sequence[tuple[int, int]], sampled: int) -> Iterator[OperatorTime]:
        tokens, decodes = self._tokens(works)
        seconds = 0.0
        for item in (*self._token_items(tokens), *self._attention_items(works)):
            seconds += item.seconds
            yield item
        rest = self._uncovered(seconds, tokens, decodes)
        streamed = max(0.0, self._stream_s - seconds) if tokens and self._stream_s else 0.0
        yield OperatorTime("streaming", "link", min(rest, streamed))
        yield OperatorTime("launches", "host", rest - min(rest, streamed))
        yield from self._head_items(sampled)

    def _tokens(self, works: Sequence[tuple[int, int]]) -> tuple[int, bool]:
        """Tokens that the step computes, padding of its graph among them, and whether it is one of decodes only."""
        tokens = 0
        max_new = 0
        for new, _ in works:
            tokens += new
            if new > max_new:
                max_new = new
        decodes = max_new <= self._max_decode_tokens
        if decodes and tokens and self._graphs and tokens <= self._graphs[-1]:
            tokens = self._graphs[bisect_left(self._graphs, tokens)]
        return tokens, decodes

    def _token_items(self, tokens: int) -> Iterator[OperatorTime]:
        """What depends on the number of tokens only."""
        shapes, profile, replica = self._shapes, self._profile, self._replica
        if not tokens:
            return
        for matrix in shapes.projections:
            yield self._gemm("projections", self._matrix, matrix, tokens)
        for matrix in shapes.plain_projections:
            yield self._gemm("projections", self._plain, matrix, tokens)
        for matrix in shapes.router:
            yield self._gemm("experts", self._plain, matrix, tokens)
        for kind in shapes.experts:
            found = laws.experts(
                self._expert_model,
                self._expert_speed,
                tokens,
                hidden=self._hidden,
                width=kind.width,
                chosen=self._chosen,
                num_experts=kind.num_experts,
                ranks=kind.ranks,
                weight_bytes=self._expert_format.weight_bytes,
                imbalance=laws.IMBALANCE if kind.ranks > 1 else 1.0,
            )
            yield OperatorTime("experts", "compute" if found.computing else "bandwidth", kind.layers * found.total)
        speed = self._attention_speed
        moved = tokens * shapes.elementwise_bytes
        seconds = laws.elementwise(self._elementwise, speed, shapes.layers * self._assumed.kernels_per_layer, moved)
        yield OperatorTime("norms and activations", "bandwidth", seconds)
        vector = 2.0 * tokens * self._hidden
        if replica.tensor_parallel > 1:
            one = laws.all_reduce(self._all_reduce, replica.tensor_parallel, vector)
            yield OperatorTime("collectives", "link", (2 * shapes.layers + 1) * one)
        if replica.pipeline_parallel > 1:
            seconds = (replica.pipeline_parallel - 1) * laws.link(self._transfer, vector / replica.tensor_parallel)
            yield OperatorTime("transfers", "link", seconds)
        if profile.kind == "cpu":
            yield OperatorTime("launches", "host", shapes.layers * self.host.layer_s)

    def _attention_items(self, works: Sequence[tuple[int, int]]) -> Iterator[OperatorTime]:
        model, speed, max_new = self._attention, self._attention_speed, self._max_decode_tokens
        for layers, heads in self._shapes.attention:
            chunks = None
            positions = rows = 0
            window = heads.window
            for new, context in works:
                if new <= max_new:
                    rows += new
                    positions += context if window is None or context < window else window
                else:
                    if chunks is None:
                        chunks = laws.PrefillChunks()
                    chunks.add(model, speed.multiprocessors, new, context, heads)
            if chunks is not None:
                found = chunks.seconds(model, speed)
                yield OperatorTime(
                    "attention prefill", "compute" if found.computing else "bandwidth", layers * found.total
                )
            if positions:
                seconds = laws.decode(model, speed, positions, rows, heads) * (model.mixed_factor if chunks else 1.0)
                yield OperatorTime("attention decode", "bandwidth", layers * seconds)

    def _head_items(self, rows: int) -> Iterator[OperatorTime]:
        if not rows:
            return
        yield self._gemm("head", self._head, self._shapes.head, rows)
        logits = rows * self._vocab * _SAMPLING_BYTES
        yield OperatorTime("sampling", "bandwidth", _SAMPLING_S + logits / self._profile.bandwidth_bytes_per_s)
        ranks = self._replica.tensor_parallel
        if ranks > 1:
            share = (ranks - 1) / ranks
            yield OperatorTime("collectives", "link", laws.link(self._all_reduce, 2.0 * rows * self._vocab, share))

    def _uncovered(self, seconds: float, tokens: int, decodes: bool) -> float:
        """Of streaming and of launches, what the layers' own `seconds` do not hide."""
        if not tokens:
            return 0.0
        needed = self._stream_s
        in_graph = decodes and bool(self._graphs) and tokens <= self._graphs[-1]
        if not in_graph and self._profile.kind != "cpu":
            needed = max(needed, self._shapes.layers * self.host.layer_s)
        return max(0.0, needed - seconds)

    def _gemm(
        self, operator: str, product: tuple[GemmModel, DeviceSpeed, GemmFormat], matrix: GemmShape, rows: int
    ) -> OperatorTime:
        model, speed, kind = product
        found = laws.gemm(
            model,
            speed,
            rows,
            matrix.n,
            matrix.k,
            weight_bytes=kind.weight_bytes,
            input_bytes=kind.input_bytes,
            dynamic=kind.dynamic,
        )
        return OperatorTime(operator, "compute" if found.computing else "bandwidth", matrix.layers * found.total)

    def _product(self, quantization: Quantization) -> tuple[GemmModel, DeviceSpeed, GemmFormat]:
        model = _operator_model(self._profile.gemm, self._engine, quantization)
        kind = FORMATS[quantization]
        return model or priors.gemm_model(self._profile, quantization), self._speed(kind), kind

    def _speed(self, kind: GemmFormat) -> DeviceSpeed:
        profile, peaks = self._profile, self._profile.peak_flops_per_s
        dtype = kind.dtype
        if dtype == "16bit" and dtype not in peaks and profile.kind == "cpu":
            dtype = "float32"
        if dtype not in peaks:
            raise UsageError(
                f"{profile.name} does not compute in {dtype}.",
                hint=f"It has {', '.join(peaks)}.",
                param="quantization",
            )
        return DeviceSpeed(peaks[dtype], profile.bandwidth_bytes_per_s, profile.multiprocessors, profile.kind != "cpu")

    def _streaming(self) -> float:
        """Seconds in which each step's offloaded weights come from the host."""
        share = self._replica.offload_share
        if not share:
            return 0.0
        model = self._profile.host_transfer or priors.host_transfer_model(self._profile)
        if model is None:
            raise UsageError(
                f"{self._profile.name} is the host: there is nowhere to offload to.", param="offload_share"
            )
        return laws.link(model, share * self._shapes.layer_weight_bytes)


def _refinement(spec: ModelSpec, profile: DeviceProfile, replica: Replica, engine: EngineName) -> Refinement | None:
    """Of this model on one device, whole and without guesses: other forms were not measured."""
    if replica.num_devices > 1 or replica.offload_share or replica.draft_tokens:
        return None
    return profile.refinement(spec.shape_digest, engine, replica.quantization, replica.kv_precision)


def _operator_model(table: Mapping[str, Mapping[Key, Model]], engine: str, key: Key) -> Model | None:
    """An engine's own, else that of any."""
    return table.get(engine, {}).get(key) or table.get("*", {}).get(key)
