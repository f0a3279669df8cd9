"""What a gateway serves: models by name, and the replicas that answer for each. One value, replaced as a whole.

The controller of a fleet sends it (PUT /admin/routes), or a file holds it; see `Routes.from_dict` for its form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
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
    """Where a replica answers, and how much may be sent there at once.

    id: unique among all, never used again for another process. url: 'http://127.0.0.1:8001'. model: its served name.
    max_num_seqs: requests it computes at once. weight: its share beside others, where routing is weighted.
    longest_prompt: of the requests that it takes, in tokens; None: any. api_key: what it wants to be asked with.
    engine: how it is asked whether it is ready, and whether it can go on with another's stream; 'openai': any server
    that speaks OpenAI's API. draining: gets nothing new, keeps what it has.
    """

    id: str
    url: str
    model: str
    engine: ServerName = "powerband"
    max_num_seqs: int = 256
    weight: float = 1.0
    longest_prompt: int | None = None
    api_key: str = ""
    draining: bool = False

    @property
    def adapter(self) -> EngineAdapter:
        return ADAPTERS[self.engine]

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            hint = "Like http://127.0.0.1:8001."
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
    """A served model. aliases: other names of it. rate: requests a second that its plan promises; None: not known.

    slo: what its users are promised, which metrics count by; None: nothing.
    usd_per_million_input, usd_per_million_output: what usage is charged at.
    """

    name: str
    aliases: tuple[str, ...] = ()
    replicas: tuple[ReplicaAddress, ...] = ()
    rate: float | None = None
    slo: SLO | None = None
    usd_per_million_input: float = 0.0
    usd_per_million_output: float = 0.0

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases):
            _check_name("model's name", name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """revision: names this state; whoever sends the same again changes nothing."""

    models: tuple[ModelRoute, ...] = ()
    revision: str = ""

    def __post_init__(self) -> None:
        names = [name for model in self.models for name in (model.name, *model.aliases)]
        ids = [replica.id for model in self.models for replica in model.replicas]
        for what, found in (("name", names), ("replica id", ids)):
            twice = sorted(one for one, times in Counter(found).items() if times > 1)
            if twice:
                raise UsageError(f"The {what} {twice[0]!r} is there twice.", hint="Each only once.", param="routes")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Routes:
        """Raises UsageError for what is missing, unknown or wrong."""
        return read_record(cls, values, "routes")

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = as_record(self, complete=True)
        return found


def _check_name(what: str, name: str, *, may_be_empty: bool = False) -> None:
    """It stands in metrics, logs and answers. Raises UsageError."""
    if len(name) > MAX_NAME or not name.isprintable() or not (name or may_be_empty):
        hint = f"It has 1 to {MAX_NAME} printable characters."
        raise UsageError(f"A {what} is {shown(name)}.", hint=hint, param="routes")
