"""What the gateway needs of a request and of its response, whether it understands them or passes them through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from powerband.gateway.request import Endpoint, GatewayRequest
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.buffered_response import BufferedResponse

if TYPE_CHECKING:
    from powerband.gateway.proxy.token_counter import TokenCounter


class ProxiedRequest(Protocol):
    """See ClientRequest and PassThroughRequest."""

    contexts: Mapping[str, int | None]
    cap: int | None
    prompt: bytes
    prompt_tokens: int
    max_prompt_usage: int

    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def path(self) -> str: ...
    @property
    def is_stream(self) -> bool: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def num_prompts(self) -> int: ...
    @property
    def num_choices(self) -> int: ...
    @property
    def num_sequences(self) -> int: ...
    @property
    def max_response_bytes(self) -> int: ...
    @property
    def size(self) -> int: ...
    def request(
        self,
        id: str,
        model: str,
        tenant: str,
        headers: Mapping[str, str],
        default_output_tokens: int,
        best_priority: int = 0,
    ) -> GatewayRequest: ...
    def upstream_body(self, replica: ReplicaAddress, tenant: str) -> bytes: ...


class ResponseState(Protocol):
    """The response to one request so far. See StreamState and PassThroughState."""

    tokens: TokenCounter
    texts: list[str]
    finish_reason: str

    @property
    def is_finished(self) -> bool:
        """Nothing of the response itself is missing."""

    @property
    def is_over(self) -> bool:
        """Nothing at all is missing: no more events are read."""

    @property
    def may_end(self) -> bool:
        """Whether the response may be complete at OpenAI's last event."""

    def begin(self, replica: ReplicaAddress) -> None:
        """The next events come from this replica."""

    def read_whole(self, response: BufferedResponse, replica: ReplicaAddress) -> list[bytes]:
        """Count the tokens of a response that was not streamed, and return it as the client gets it.

        Raises UpstreamFailure and InvalidUpstreamRequest.
        """

    def process_event(self, data: bytes, now_s: float) -> bytes:
        """The events for the client, from one event's data. Raises UpstreamFailure and InvalidUpstreamRequest."""

    def cut(self, reason: str) -> bytes:
        """The end of a stream whose replica sends too much. Raises UpstreamFailure if it cannot be ended."""

    def finish(self) -> bytes:
        """The end of a stream of which only the end was lost. Raises CannotResume."""

    def final_events(self) -> bytes:
        """What follows the last event of the replica."""
