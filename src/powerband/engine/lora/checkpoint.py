"""From an adapter's folder to its matrices, checked against the model before a byte of them is read. No pickles."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from powerband.engine.linear.adapters import AdapterDelta, AdapterWeights, KernelDelta, Piece
from powerband.engine.lora.config import CODE, AdapterConfig, layer_of, read_adapter_config
from powerband.engine.lora.targets import AdapterTarget
from powerband.engine.model_loader.safetensors_file import SafetensorsFile
from powerband.errors import EnvironmentFault, UsageError

WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
# What stands between that and "layers.N", by the kind of base model that was adapted.
_BASES = ("model.", "", "model.language_model.", "language_model.model.", "language_model.", "model.model.")
_A, _B = ".lora_A.weight", ".lora_B.weight"
_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two tensors of a target, by their names in the file."""

    module: str  # as PEFT knows it: the name in its own base model
    target: AdapterTarget
    a: str
    b: str


class AdapterReader:
    """Reads adapters for one model. Safe to use in a thread beside the engine's loop."""

    def __init__(
        self,
        targets: Mapping[str, AdapterTarget],
        *,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: bool = False,
    ) -> None:
        """kernels: the C++ kernels may be used."""
        self._targets = targets
        self._max_rank = max_rank
        self._dtype = dtype
        self._device = device
        self._kernels = kernels

    def read(self, folder: Path) -> AdapterWeights:
        """Raises EnvironmentFault for files that are missing or damaged, and UsageError that names the tensor at fault:
        one of another model, of a rank too large, of another kind of adapter.
        """
        config = read_adapter_config(folder)
        path = folder / WEIGHTS
        if not path.is_file():
            raise _no_weights(folder)
        with SafetensorsFile(path) as file:
            pairs = self._pairs(file, config)
            for pair in pairs:
                self._check(file, pair, config)
            return self._load(file, pairs, config)

    def _pairs(self, file: SafetensorsFile, config: AdapterConfig) -> list[_Pair]:
        names = set(file.names())
        pairs: dict[str, _Pair] = {}
        base = None
        for name in sorted(names):
            module = name.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)
            inside = module[max(module.find("layers."), 0) :]
            before = module.removesuffix(inside)
            target = self._targets.get(f"model.{inside}")
            base = before if base is None else base
            is_pair = name.startswith(_PREFIX) and name.endswith((_A, _B))
            if not is_pair or target is None or before not in _BASES or before != base:
                raise self._unexpected(name, module, file)
            pair = _Pair(module, target, f"{_PREFIX}{module}{_A}", f"{_PREFIX}{module}{_B}")
            missing = next((one for one in (pair.a, pair.b) if one not in names), None)
            if missing is not None:
                raise _wrong(f"{file.path} has {name} without {missing}", "The file is incomplete.")
            if config.targets.selects(module) is False:
                raise _wrong(
                    f"{file.path} has {name}, which target_modules of {config.source} do not name",
                    "The two files belong to different adapters.",
                )
            pairs[module] = pair
        if not pairs:
            raise _wrong(f"{file.path} holds no tensor")
        self._check_complete(pairs, base or "", file, config)
        return list(pairs.values())

    def _check_complete(
        self, pairs: Mapping[str, _Pair], base: str, file: SafetensorsFile, config: AdapterConfig
    ) -> None:
        """Every module that the configuration selects must be there: else it is an adapter of a smaller model."""
        for name in self._targets:
            module = base + name.removeprefix("model.")
            if module not in pairs and config.targets.selects(module):
                raise _wrong(
                    f"{file.path} lacks {_PREFIX}{module}{_A}, a module that target_modules name",
                    "The adapter belongs to another base model, or the file is incomplete.",
                )

    def _unexpected(self, name: str, module: str, file: SafetensorsFile) -> UsageError:
        for mark, what in _KINDS.items():
            if mark in name:
                return _wrong(f"{file.path} has {name}: {what} not supported", "Train the adapter without it.")
        layers = {layer_of(target) for target in self._targets}
        where = f"; the model has {len(layers)} layers" if layer_of(module) > max(layers) else ""
        return _wrong(
            f"{file.path} has {name} {_shape(file, name)}, which the model has no place for{where}",
            "The adapter belongs to another base model.",
        )

    def _check(self, file: SafetensorsFile, pair: _Pair, config: AdapterConfig) -> None:
        rank, target = config.rank_of(pair.module), pair.target
        if rank > self._max_rank:
            raise _wrong(
                f"{pair.a} in {file.path} has rank {rank}; max_lora_rank is {self._max_rank}",
                f"Start the engine with --max-lora-rank {rank}, or more.",
            )
        for name, shape in ((pair.a, [rank, target.in_features]), (pair.b, [target.out_features, rank])):
            if file.shape(name) != shape:
                raise _wrong(
                    f"{name} in {file.path} has shape {_shape(file, name)}; the model and the adapter's configuration "
                    f"ask for {shape}",
                    "The adapter belongs to another base model, or to another configuration.",
                )
            if file.dtype(name) not in _FLOAT_TYPES:
                raise _wrong(f"{name} in {file.path} is stored as {file.dtype(name)}")

    def _load(self, file: SafetensorsFile, pairs: Iterable[_Pair], config: AdapterConfig) -> AdapterWeights:
        digest = hashlib.sha256()
        rank = 0
        by_part: dict[str, list[tuple[_Pair, torch.Tensor, torch.Tensor]]] = {}
        for pair in pairs:
            scale = config.scale_of(pair.module)
            a, b = (self._tensor(file, name) for name in (pair.a, pair.b))
            digest.update(f"{pair.target.part} {pair.target.start} {list(a.shape)} {list(b.shape)} {scale}\n".encode())
            for tensor in (a, b):
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
            rank = max(rank, a.shape[0])
            held = [a.to(self._dtype), (b.float() * scale).to(self._dtype)]
            by_part.setdefault(pair.target.part, []).append((pair, held[0], held[1]))
        return AdapterWeights(digest.hexdigest(), rank, {part: self._delta(own) for part, own in by_part.items()})

    def _tensor(self, file: SafetensorsFile, name: str) -> torch.Tensor:
        tensor = file.read(name)
        if not bool(tensor.isfinite().all()):
            raise _wrong(f"{name} in {file.path} holds values that are not finite", "The file is damaged.")
        return tensor

    def _delta(self, pieces: list[tuple[_Pair, torch.Tensor, torch.Tensor]]) -> AdapterDelta | KernelDelta:
        placed, first_rank = [], 0
        for pair, a, b in pieces:
            placed.append(Piece(b.to(self._device), pair.target.start, first_rank))
            first_rank += a.shape[0]
        delta = AdapterDelta(torch.cat([a for _, a, _ in pieces]).to(self._device), tuple(placed))
        return KernelDelta(delta) if self._kernels and KernelDelta.takes(delta) else delta


# Parts of names that belong to something else than LoRA of projections.
_KINDS = {
    "lora_magnitude_vector": "DoRA is",
    "lora_embedding_": "an adapter of the embedding is",
    "embed_tokens": "an adapter of the embedding is",
    "lm_head": "an adapter of the output head is",
    "experts.": "an adapter of experts is",
    "block_sparse_moe.gate": "an adapter of the experts' router is",
    "mlp.gate.": "an adapter of the experts' router is",
    "mlp.router": "an adapter of the experts' router is",
    ".bias": "a bias that was trained is",
    "modules_to_save": "a module that was trained whole is",
    "norm.weight": "a module that was trained whole is",
    "vision": "an adapter of the image encoder is",
    "visual": "an adapter of the image encoder is",
    "audio": "an adapter of the audio encoder is",
    "ia3_": "(IA)3 is",
    "hada_": "LoHa is",
    "lokr_": "LoKr is",
    "prompt_embeddings": "prompt tuning is",
}


def _no_weights(folder: Path) -> EnvironmentFault:
    found = "only pickled weights, which can run code and are never loaded" if (folder / _PICKLED).exists() else ""
    return EnvironmentFault(
        f"{folder} has no {WEIGHTS}{f', {found}' if found else ''}.",
        hint="Save the adapter with PEFT's save_pretrained, which writes safetensors.",
        code="pickled_weights" if found else "adapter_not_found",
        param="lora",
    )


def _shape(file: SafetensorsFile, name: str) -> str:
    return str(file.shape(name))


def _wrong(problem: str, hint: str = "") -> UsageError:
    return UsageError(f"{problem}.", hint=hint, code=CODE, param="lora")
