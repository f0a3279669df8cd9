"""The adapters that an engine holds, by name. Read beside the loop, added and removed between two steps.

name ──► weights ◄── digest ◄── requests          Two names of one content share its weights. Weights whose name is
"sql"    A and B     3f9a…      of "sql"          gone are kept until no request needs them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

import torch

from powerband.engine.client.messages import AdapterInfo
from powerband.engine.linear.adapters import AdapterWeights
from powerband.engine.lora.checkpoint import AdapterReader
from powerband.engine.lora.targets import adapter_targets
from powerband.engine.model_loader.checkpoint import resolve_adapter
from powerband.errors import InvalidRequest, UsageError
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.settings import EngineSettings, is_adapter_name


class AdapterRegistry:
    """Belongs to the engine's loop, except `read`. `held`: all weights by digest, which the executor looks up."""

    def __init__(
        self,
        spec: ModelSpec,
        settings: EngineSettings,
        held: dict[str, AdapterWeights],
        device: torch.device,
        *,
        kernels: bool,
        in_use: Callable[[], Collection[str]],
    ) -> None:
        """settings: with dtype filled in. in_use: returns the digests that live requests have."""
        self.max_adapters = settings.adapter_slots
        self._max_rank = settings.max_lora_rank
        self._spec = spec
        self._dtype = getattr(torch, settings.dtype)
        self._device = device
        self._kernels = kernels
        self._held = held
        self._in_use = in_use
        self._names: dict[str, AdapterInfo] = {}

    def infos(self) -> list[AdapterInfo]:
        return list(self._names.values())

    def load(self, name: str, source: str) -> AdapterInfo:
        """Read and add an adapter. Raises as `begin_load` and what that returns."""
        return self.begin_load(name, source)()

    def begin_load(self, name: str, source: str, replace: bool = False) -> Callable[[], AdapterInfo]:
        """Read an adapter from a folder or a Hugging Face id: slow, for a thread beside the loop.

        Returns what adds it, for the loop. replace: a name that is in use is given to this adapter.
        Raises as `AdapterReader.read`, and InvalidRequest where there is no room or the name is taken.
        """
        self._check(name, replace)
        weights = self._reader.read(resolve_adapter(source))
        return lambda: self._add(name, source, weights, replace)

    def _check(self, name: str, replace: bool) -> None:
        """Raise the error if no adapter could be added under this name, whatever it holds."""
        if not is_adapter_name(name):
            raise UsageError(f"{name[:200]!r} cannot be the name of an adapter.", param="lora_name")
        if name in self._names and not replace:
            raise InvalidRequest(
                f"An adapter {name!r} is loaded already.",
                hint="Unload it first, or set load_inplace.",
                code="adapter_exists",
                param="lora_name",
            )
        if self.max_adapters == 0:
            raise UsageError(
                "This engine has no room for adapters.", hint="Start it with --max-loras N.", code="too_many_adapters"
            )

    def _add(self, name: str, source: str, weights: AdapterWeights, replace: bool) -> AdapterInfo:
        self._check(name, replace)
        self.release()
        if weights.digest not in self._held and len(self._held) >= self.max_adapters:
            raise InvalidRequest(
                f"{len(self._held)} adapters are loaded or still in use, which is max_loras.",
                hint="Unload one, or start the engine with a higher --max-loras.",
                code="too_many_adapters",
                param="lora_name",
            )
        self._held.setdefault(weights.digest, weights)
        info = AdapterInfo(name, source, weights.digest, weights.rank, weights.memory_bytes)
        self._names[name] = info
        return info

    def remove(self, name: str) -> AdapterInfo:
        """Take the name away. Raises InvalidRequest for an unknown one."""
        info = self._names.pop(name, None)
        if info is None:
            raise InvalidRequest(f"There is no adapter {name[:200]!r}.", code="adapter_not_found", param="lora_name")
        return info

    def release(self) -> None:
        """Let go of weights that have no name and that no request needs."""
        if len(self._held) > len({info.digest for info in self._names.values()}):
            kept = {*self._in_use(), *(info.digest for info in self._names.values())}
            for digest in self._held.keys() - kept:
                del self._held[digest]

    @functools.cached_property
    def _reader(self) -> AdapterReader:
        targets = adapter_targets(self._spec)
        return AdapterReader(
            targets, max_rank=self._max_rank, dtype=self._dtype, device=self._device, kernels=self._kernels
        )
