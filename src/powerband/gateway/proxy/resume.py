"""Resumes a broken stream at another replica: which request continues it, so that the client notices nothing.

engine                              request                                      exact
accepts the output's token ids      the same request, with those ids             always
completes a prompt of token ids     a completion of prompt ids + output ids      see its file in `engines/`
others                              none: retried only before the first token    –
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Raw

from powerband.core.request import OUTPUT_COMPLETE
from powerband.engines.base import BrokenStream, CannotResume
from powerband.gateway.proxy.client_request import PATHS, ClientRequest
from powerband.gateway.proxy.request_fields import UnsuitableReplica
from powerband.gateway.proxy.stream_state import StreamState
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.client import UpstreamClient
from powerband.gateway.upstream.errors import InvalidUpstreamRequest
from powerband.gateway.upstream.failure import UpstreamFailure
from powerband.openai.chunks import TokenIds, has_ids
from powerband.openai.errors import ReportedError

_ASK_S = 5.0
_IDS = msgspec.json.Decoder(TokenIds)
_FIELDS = msgspec.json.Decoder(dict[str, Raw])


class Resumer:
    """Builds the request of each further attempt of one stream."""

    def __init__(
        self, client_request: ClientRequest, state: StreamState, upstream: UpstreamClient, tenant: str
    ) -> None:
        self._client_request = client_request
        self._state = state
        self._upstream = upstream
        self._tenant = tenant

    async def plan(self, replica: ReplicaAddress) -> tuple[str, bytes]:
        """Path and body for this replica.

        Raises CannotResume; UnsuitableReplica if only a replica of another engine can resume; UpstreamFailure if the
        replica does not return what is needed; and InvalidUpstreamRequest if the output is already complete.
        """
        state, client_request, adapter = self._state, self._client_request, replica.adapter
        path = PATHS[client_request.endpoint]
        if not state.tokens.num_output:
            state.resume(kept=0)
            return path, client_request.upstream_body(replica, self._tenant)
        if not client_request.can_resume or state.tokens.has_missing_ids:
            raise CannotResume
        if state.adapter is not adapter:
            raise UnsuitableReplica(CannotResume())
        if adapter.takes_resume_token_ids:
            state.resume(kept=len(state.tokens.token_ids))
            return path, client_request.upstream_body(replica, self._tenant, state.tokens.token_ids)
        if adapter.complete_stream is None:
            raise CannotResume
        body = client_request.upstream_body(replica, self._tenant)
        if not (state.texts or state.is_parsed or state.wants_empty_chunks):  # the client has nothing yet
            state.resume(kept=0)
            return path, body
        if not has_ids(state.tokens.prompt_ids) or state.is_parsed:
            raise CannotResume

        async def ask(method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
            return await self._ask(replica, method, path, body)

        is_chat = client_request.endpoint == "chat"
        broken = BrokenStream(
            model=replica.model,
            fields=_FIELDS.decode(body),
            is_chat=is_chat,
            max_tokens=client_request.limit,
            prompt_ids=_decoded(state.tokens.prompt_ids),
            token_ids=state.tokens.token_ids,
            text="".join(state.texts),
            has_sent_ids=state.wants_empty_chunks,
        )
        found = await adapter.complete_stream(broken, ask)
        if found is None:
            raise InvalidUpstreamRequest(ReportedError("All tokens have come.", code=OUTPUT_COMPLETE))
        state.resume(kept=found.kept, skipped=found.skipped, converts_to_chat=is_chat, counts_as_prompt=True)
        return PATHS["completions"], msgspec.json.encode(found.fields)

    async def _ask(
        self, replica: ReplicaAddress, method: str, path: str, body: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        data = b"" if body is None else msgspec.json.encode(body)
        try:
            status, response = await self._upstream.ask(replica, method, path, data, _ASK_S)
            if 400 <= status < 500:  # the replica lacks this endpoint
                raise CannotResume
            if status != 200:
                raise UpstreamFailure("resume", f"{path} of a replica answers {status}.")
            found: dict[str, Any] = msgspec.json.decode(response, type=dict[str, Any])
        except (OSError, msgspec.MsgspecError) as problem:
            raise UpstreamFailure("resume", f"{path} of a replica failed: {problem}.") from None
        return found


def _decoded(ids: Raw) -> list[int]:
    try:
        return _IDS.decode(ids)
    except msgspec.MsgspecError as problem:
        raise CannotResume from problem
