"""How another replica goes on with a stream that broke off: what to ask it for, so that the client notices nothing.

engine       asked for                                               exact
powerband    the same request, and the ids of the output so far      always
vllm         a completion of prompt ids + output ids so far          greedy decoding; without a seed, sampling goes on
others       nothing: retried only before the first token          –

vLLM counts some things over the output alone (presence and frequency penalties, seeds, grammars, bad words), and reads
others out of it (tool calls, reasoning): such a stream ends with an error, since it would go on differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw

from powerband.gateway.proxy.client_request import PATHS, ClientRequest
from powerband.gateway.proxy.exchange import UpstreamFailure
from powerband.gateway.proxy.stream_state import StreamState
from powerband.gateway.proxy.upstream import UpstreamClient
from powerband.gateway.routes import ReplicaAddress
from powerband.openai.chunks import TokenIds, has_ids

_ASK_S = 5.0
# Of a chat that a completion does not take, or has had its effect on the prompt.
_ONLY_CHAT = frozenset(
    (
        *("messages", "max_completion_tokens", "top_logprobs", "chat_template", "chat_template_kwargs", "tools"),
        *("tool_choice", "parallel_tool_calls", "add_generation_prompt", "continue_final_message", "documents"),
        *(
            "add_special_tokens",
            "reasoning_effort",
            "include_reasoning",
            "echo",
            "truncate_prompt_tokens",
            "modalities",
        ),
    )
)
# What looks at the output alone, so that output in the prompt would not count.
_STATEFUL = frozenset(
    (
        *("presence_penalty", "frequency_penalty", "bad_words", "structured_outputs", "use_beam_search"),
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structural_tag", "logits_processors"),
        *("thinking_token_budget", "vllm_xargs"),
    )
)
_IDS = msgspec.json.Decoder(TokenIds)
_CONTEXT = 16  # tokens of the prompt that are decoded with the output, since the first token's text depends on them


class CannotResume(Exception):
    """No replica of this engine can go on with this request."""


class Resumer:
    """Makes the plan of each further try of one stream."""

    def __init__(
        self, client_request: ClientRequest, state: StreamState, upstream: UpstreamClient, tenant: str
    ) -> None:
        self._client_request = client_request
        self._state = state
        self._upstream = upstream
        self._tenant = tenant

    async def plan(self, replica: ReplicaAddress) -> tuple[str, bytes]:
        """Path and body. Raises CannotResume, and UpstreamFailure when the replica does not say what is needed."""
        state, client_request = self._state, self._client_request
        path = PATHS[client_request.endpoint]
        if not state.num_tokens:
            state.resume(kept=0)
            return path, client_request.upstream_body(replica, self._tenant)
        if not client_request.can_resume or state.has_gap or state.engine != replica.engine:
            raise CannotResume
        if replica.engine == "powerband":
            state.resume(kept=len(state.token_ids))
            return path, client_request.upstream_body(replica, self._tenant, state.token_ids)
        if replica.engine != "vllm":
            raise CannotResume
        if not state.texts and not state.wants_silence:  # the client has nothing yet
            state.resume(kept=0)
            return path, client_request.upstream_body(replica, self._tenant)
        return PATHS["completions"], await self._completion(replica)

    async def _completion(self, replica: ReplicaAddress) -> bytes:
        """For vLLM. Tokens whose text the client does not have completely are generated again."""
        state, client_request = self._state, self._client_request
        fields = dict(msgspec.json.decode(client_request.upstream_body(replica, self._tenant), type=dict[str, Raw]))
        is_chat = client_request.endpoint == "chat"
        if (
            not has_ids(state.prompt_ids)
            or state.is_parsed
            or (is_chat and client_request.fields.logprobs)
            or _looks_back(fields)
        ):
            raise CannotResume
        prompt_ids = _decoded(state.prompt_ids)
        kept, skipped = await self._kept(replica, prompt_ids)
        if state.wants_silence and (skipped or len(kept) < len(state.token_ids)):
            raise CannotResume  # the client has the ids already
        limit = client_request.limit
        if limit is None and is_chat:
            limit = await self._room(replica) - len(prompt_ids)
        limit = 16 if limit is None else limit  # vLLM's default, and OpenAI's
        changes: dict[str, Any] = {"prompt": [*prompt_ids, *kept], "max_tokens": max(1, limit - len(kept))}
        if _value(fields, "min_tokens"):
            changes["min_tokens"] = max(0, msgspec.json.decode(fields["min_tokens"], type=int) - len(kept))
        dropped = _ONLY_CHAT if is_chat else {"echo", "truncate_prompt_tokens", "add_special_tokens"}
        passed = {name: value for name, value in fields.items() if name not in dropped}
        if is_chat:
            passed.pop("logprobs", None)
        state.resume(kept=len(kept), skipped=skipped, is_other_kind=is_chat, counts_as_prompt=True)
        return msgspec.json.encode({**passed, **changes})

    async def _kept(self, replica: ReplicaAddress, prompt_ids: Sequence[int]) -> tuple[Sequence[int], str]:
        """The most of the output's ids whose text the client has, and what it has beyond that: the beginning of the
        next token, which ends in half a letter, or of what a stop string held back. Its tokenizer is asked."""
        ids, text = self._state.token_ids, "".join(self._state.texts)
        context = prompt_ids[-_CONTEXT:]
        before = await self._text(replica, context)
        for dropped in range(min(len(ids), _CONTEXT) + 1):
            kept = ids[: len(ids) - dropped]
            in_context = await self._text(replica, [*context, *kept])
            if in_context.startswith(before) and text.startswith(said := in_context[len(before) :]):
                return kept, text[len(said) :]
            if text.startswith(said := await self._text(replica, kept)):
                return kept, text[len(said) :]
        raise CannotResume

    async def _text(self, replica: ReplicaAddress, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        found = await self._ask(replica, "POST", "/detokenize", {"model": replica.model, "tokens": list(ids)})
        return str(found.get("prompt", ""))

    async def _room(self, replica: ReplicaAddress) -> int:
        """The longest prompt plus output, in tokens."""
        found = await self._ask(replica, "GET", "/v1/models", None)
        lengths = [card.get("max_model_len") for card in found.get("data", ()) if card.get("id") == replica.model]
        if not lengths or not isinstance(lengths[0], int):
            raise CannotResume
        return lengths[0]

    async def _ask(
        self, replica: ReplicaAddress, method: str, path: str, body: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        data = b"" if body is None else msgspec.json.encode(body)
        try:
            status, answer = await self._upstream.ask(replica, method, path, data, _ASK_S)
            if 400 <= status < 500:  # it does not offer this
                raise CannotResume
            if status != 200:
                raise UpstreamFailure("resume", f"{path} of a replica answers {status}.")
            found: dict[str, Any] = msgspec.json.decode(answer, type=dict[str, Any])
        except (OSError, msgspec.MsgspecError) as problem:
            raise UpstreamFailure("resume", f"{path} of a replica failed: {problem}.") from None
        return found


def _decoded(ids: Raw) -> list[int]:
    try:
        return _IDS.decode(ids)
    except msgspec.MsgspecError as problem:
        raise CannotResume from problem


def _looks_back(fields: Mapping[str, Raw]) -> bool:
    """Whether the next token depends on the output in a way that output in the prompt does not carry on."""
    if any(_value(fields, name) for name in _STATEFUL):
        return True
    form = _value(fields, "response_format")
    has_form = isinstance(form, dict) and form.get("type") != "text"
    has_tools = bool(_value(fields, "tools")) and _value(fields, "tool_choice") != "none"
    is_seeded = _value(fields, "seed") is not None and _value(fields, "temperature") != 0
    return has_form or has_tools or is_seeded


def _value(fields: Mapping[str, Raw], name: str) -> Any:
    return msgspec.json.decode(fields[name]) if name in fields else None
