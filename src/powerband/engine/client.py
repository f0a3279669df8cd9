"""How everyone else talks to an engine: requests in, tokens out. No torch here, so that a front process stays light.

Two implementations: in this process (`LLM`), and in a process of its own behind a private socket (`server`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from powerband.core.request import EngineRequest
from powerband.core.step import TokenOutput

__all__ = ["EngineClient", "EngineRequest"]


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
