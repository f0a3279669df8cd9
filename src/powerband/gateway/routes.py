"""Routes: the models that a gateway serves, and the replicas of each. One immutable value, replaced as a whole.

It comes from a fleet's controller (PUT /admin/routes) or from a file; `Routes.from_dict` parses it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from powerband.engines.base import EngineAdapter, ServerName
from powerband.engines.registry import ADAPTERS
from powerband.errors import UsageError
from powerband.spec.config_reader import shown
from powerband.spec.slo import SLO
from powerband.spec.yaml_codec import as_record, read_record
from powerband.web.authority import split_authority

MAX_NAME = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaAddress:
    """Where a replica listens, and which requests it accepts."""

    id: str  # unique, and never reused for another process
    url: str  # http://127.0.0.1:8001
    model: str  # the model's name at the replica
    engine: ServerName = "powerband"  # decides probes, metrics and resuming; 'openai': any other server
    max_num_seqs: int = 256  # requests that it runs at once
    weight: float = 1.0  # its share of the requests relative to other replicas', with weighted routing
    max_prompt_tokens: int | None = field(default=None, metadata={"was": "longest_prompt"})
    api_key: str = ""  # the replica's API key
    draining: bool = False  # gets no new requests; running ones finish

    @property
    def adapter(self) -> EngineAdapter:
        return ADAPTERS[self.engine]

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            hint = "Like http://127.0.0.1:8001."
            raise UsageError(f"replica {self.id[:MAX_NAME]} has url {shown(self.url)}.", hint=hint, param="url")
        if self.url.rstrip("/").endswith("/v1"):
            hint = "Leave out /v1: the paths of all APIs are put behind the URL."
            raise UsageError(f"replica {self.id[:MAX_NAME]} has url {shown(self.url)}.", hint=hint, param="url")
        split_authority(self.url.partition("://")[2].partition("/")[0], 80)
        if not self.url.isascii() or not (self.url + self.api_key).isprintable() or not self.api_key.isascii():
            raise UsageError(f"replica {self.id}: url and api_key are printable ASCII.", param="url")
        if self.max_num_seqs < 1 or self.weight < 0:
            raise UsageError(f"replica {self.id}: max_num_seqs is at least 1, weight not negative.", param="replicas")
        _check_name("replica's id", self.id)
        _check_name("replica's model", self.model, may_be_empty=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRoute:
    """A served model and its replicas."""

    name: str
    aliases: tuple[str, ...] = ()
    replicas: tuple[ReplicaAddress, ...] = ()
    rate: float | None = None  # requests per second that its plan promises
    slo: SLO | None = None  # the SLO whose attainment the metrics count
    usd_per_million_input: float = 0.0  # price per million tokens
    usd_per_million_output: float = 0.0
    revision: str = ""  # identifies this route: sent again, it changes nothing

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelRoute:
        """Raises UsageError for missing, unknown or invalid fields."""
        return read_record(cls, values, "route")

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = as_record(self, complete=True)
        return found

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases):
            _check_name("model's name", name)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRoute:
    """A LoRA adapter that every replica of a model should have."""

    name: str
    path: str  # a folder as the replicas see it, or a Hugging Face id
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """All models that a gateway serves."""

    models: tuple[ModelRoute, ...] = ()
    adapters: tuple[AdapterRoute, ...] = ()
    revision: str = ""  # identifies these routes: sent again, they change nothing

    def __post_init__(self) -> None:
        names = [name for model in self.models for name in (model.name, *model.aliases)]
        ids = [replica.id for model in self.models for replica in model.replicas]
        for what, found in (("name", names), ("replica id", ids)):
            twice = sorted(one for one, times in Counter(found).items() if times > 1)
            if twice:
                raise UsageError(f"The {what} {twice[0]!r} occurs twice.", hint="Each must be unique.", param="routes")

    def with_model(self, model: ModelRoute) -> Routes:
        """The same routes with this model, in place of the one with its name. Raises UsageError if it collides with
        another one.
        """
        others = [one for one in self.models if one.name != model.name]
        return Routes(models=(*others, model), adapters=self.adapters)

    def without_model(self, name: str) -> Routes:
        return Routes(
            models=tuple(one for one in self.models if one.name != name),
            adapters=tuple(one for one in self.adapters if one.model != name),
        )

    def adapter(self, name: str) -> AdapterRoute | None:
        return next((one for one in self.adapters if one.name == name), None)

    def with_adapter(self, adapter: AdapterRoute) -> Routes:
        others = self.without_adapter(adapter.name)
        return replace(others, adapters=(*others.adapters, adapter))

    def without_adapter(self, name: str) -> Routes:
        return replace(self, adapters=tuple(one for one in self.adapters if one.name != name))

    def model(self, name: str) -> ModelRoute | None:
        return next((one for one in self.models if one.name == name), None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Routes:
        """Raises UsageError for missing, unknown or invalid fields."""
        return read_record(cls, values, "routes")

    def as_dict(self, *, old_names: bool = False) -> dict[str, Any]:
        """old_names: use the previous version's field names, for a gateway that still runs that version."""
        found: dict[str, Any] = as_record(self, complete=True, old_names=old_names)
        if not self.adapters:  # gateways before them know no such field
            del found["adapters"]
        return found


def _check_name(what: str, name: str, *, may_be_empty: bool = False) -> None:
    """Names appear in metrics, logs and responses. Raises UsageError."""
    if len(name) > MAX_NAME or not name.isprintable() or not (name or may_be_empty):
        hint = f"It has 1 to {MAX_NAME} printable characters."
        raise UsageError(f"A {what} is {shown(name)}.", hint=hint, param="routes")
