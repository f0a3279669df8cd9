"""LoRA adapters of `LLM`: named in the call, as with vLLM, and loaded when they are first used. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from powerband.engine.client.messages import AdapterInfo
from powerband.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter: vLLM's class. lora_path: a folder or Hugging Face id; "": it was loaded by the setting `lora`.

    The name says which adapter it is. lora_int_id is what vLLM knows it by, and has no effect here.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""


AdapterChoice = LoRARequest | Sequence[LoRARequest | None] | None


class OfflineAdapters:
    """Loads what calls ask for; where there is no room, the adapter that was not used for longest makes some."""

    def __init__(
        self,
        loaded: Sequence[AdapterInfo],
        max_adapters: int,
        *,
        load: Callable[[str, str], AdapterInfo],
        unload: Callable[[str], object],
    ) -> None:
        """load(name, source), unload(name): of the engine, when no request runs."""
        self._loaded = {info.name: info for info in loaded}  # the one used last stands last
        self._max_adapters = max_adapters
        self._load = load
        self._unload = unload

    def digests(self, asked: AdapterChoice, count: int) -> list[str]:
        """The adapter of each of `count` prompts, as `EngineRequest.adapter` has it. Raises InvalidRequest, and what
        loading raises.
        """
        every = list(asked) if isinstance(asked, Sequence) else [asked] * count
        wrong = next((one for one in every if one is not None and not isinstance(one, LoRARequest)), None)
        if wrong is not None:
            raise InvalidRequest(f"{wrong!r} is not a LoRARequest.", param="lora_request")
        if len(every) != count:
            raise InvalidRequest(
                f"There are {count} prompts and {len(every)} lora_requests.",
                hint="Give one for all, or one or None per prompt.",
                param="lora_request",
            )
        chosen: dict[str, LoRARequest] = {}
        for one in every:
            if one is not None and chosen.setdefault(one.lora_name, one).lora_path != one.lora_path:
                raise InvalidRequest(f"Two adapters are called {one.lora_name!r}.", param="lora_request")
        if len(chosen) > self._max_adapters:
            raise InvalidRequest(
                f"The call uses {len(chosen)} adapters; max_loras is {self._max_adapters}.",
                hint=f"Make the LLM with max_loras={len(chosen)}.",
                code="too_many_adapters",
                param="lora_request",
            )
        digests = {name: self._ready(one, chosen).digest for name, one in chosen.items()}
        return ["" if one is None else digests[one.lora_name] for one in every]

    def _ready(self, asked: LoRARequest, chosen: dict[str, LoRARequest]) -> AdapterInfo:
        info = self._loaded.pop(asked.lora_name, None)
        if info is not None and asked.lora_path not in ("", info.source):
            self._unload(asked.lora_name)
            info = None
        if info is None:
            if not asked.lora_path:
                raise InvalidRequest(
                    f"The adapter {asked.lora_name!r} is not loaded, and no lora_path is given.", param="lora_request"
                )
            if len(self._loaded) >= self._max_adapters:
                oldest = next(name for name in self._loaded if name not in chosen)
                del self._loaded[oldest]
                self._unload(oldest)
            info = self._load(asked.lora_name, asked.lora_path)
        self._loaded[asked.lora_name] = info
        return info
