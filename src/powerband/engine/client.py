"""How everyone else talks to an engine: requests in, tokens out. No torch here, so that a front process stays light.

Two implementations: in this process (`LLM`), and in a process of its own behind a private socket (`server`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from powerband.core.params import SamplingParams
from powerband.core.step import TokenOutput


@dataclass(slots=True, kw_only=True)
class EngineRequest:
    """One request as the engine takes it: token ids only, `params` complete (see SamplingParams), n = 1."""

    id: str
    token_ids: list[int]
    params: SamplingParams
    arrival_s: float  # time.monotonic()
    priority: int = 0  # lower is served first
    tenant: str = ""
    deadline_s: float | None = None  # time.monotonic() by which the first token is wanted
    cache_salt: str = ""


class EngineClient(Protocol):
    """The asynchronous face of an engine."""

    def generate(self, request: EngineRequest) -> AsyncIterator[TokenOutput]:
        """Yield outputs until one has a finish_reason. Closing the iterator early aborts the request.

        A refusal (queue full, too long) arrives as the only output, with `finish_reason=ERROR` and `error` set.
        """
        ...

    async def call(self, method: str, **kwargs: Any) -> Any:
        """Run an administrative method on the engine: pause, resume, reset_prefix_cache, stats, config."""
        ...
