"""How another replica goes on with a stream that broke off: what to ask it for, so that the client notices nothing.

engine       asked for                                                    exact
powerband    the same request, and the ids of the output so far           always
vllm         a completion of prompt ids + output ids so far               greedy decoding
others       nothing: only what has told no token yet is asked again      –
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw

from powerband.gateway.proxy.connection import UpstreamFailure
from powerband.gateway.proxy.intake import PATHS, Intake
from powerband.gateway.proxy.story import Story
from powerband.gateway.proxy.upstream import Upstream
from powerband.gateway.routes import ReplicaAddress

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
# What depends on the tokens before in a way that a new prompt does not carry on.
_STATEFUL = frozenset(("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice"))
_NO_STOP = (b"null", b"[]", b'""')
_CONTEXT = 16  # tokens of the prompt that are decoded with the output, since the first token's text depends on them


class CannotResume(Exception):
    """No replica of this engine can go on with this request."""


class Resumer:
    """Makes the plan of each further try of one stream."""

    def __init__(self, intake: Intake, story: Story, upstream: Upstream, tenant: str) -> None:
        self._intake = intake
        self._story = story
        self._upstream = upstream
        self._tenant = tenant

    async def plan(self, replica: ReplicaAddress) -> tuple[str, bytes]:
        """Path and body. Raises CannotResume, and UpstreamFailure when the replica does not say what is needed."""
        story, intake = self._story, self._intake
        path = PATHS[intake.endpoint]
        if not story.num_tokens:
            story.resume(kept=0)
            return path, intake.body_for(replica, self._tenant)
        if not intake.can_resume or story.has_gap:
            raise CannotResume
        if replica.engine == "powerband":
            story.resume(kept=len(story.token_ids))
            return path, intake.body_for(replica, self._tenant, story.token_ids)
        if replica.engine == "vllm":
            return PATHS["completions"], await self._completion(replica)
        raise CannotResume

    async def _completion(self, replica: ReplicaAddress) -> bytes:
        """For vLLM. Tokens whose text has not been told are made again."""
        story, intake = self._story, self._intake
        fields = dict(msgspec.json.decode(intake.body_for(replica, self._tenant), type=dict[str, Raw]))
        is_chat = intake.endpoint == "chat"
        if not story.prompt_ids or story.is_parsed or (is_chat and intake.asked.logprobs) or _STATEFUL & fields.keys():
            raise CannotResume
        # Where stop strings hold text back, only the text itself shows how far it goes.
        holds_back = bytes(fields.get("stop", Raw(b"null"))) not in _NO_STOP
        kept = await self._told_ids(replica) if holds_back else story.token_ids[: story.num_said]
        limit = intake.limit
        if limit is None and is_chat:
            limit = await self._room(replica) - len(story.prompt_ids)
        limit = 16 if limit is None else limit  # vLLM's default, and OpenAI's
        told: dict[str, Any] = {"prompt": [*story.prompt_ids, *kept], "max_tokens": max(1, limit - len(kept))}
        if "min_tokens" in fields:
            told["min_tokens"] = max(0, msgspec.json.decode(fields["min_tokens"], type=int) - len(kept))
        dropped = _ONLY_CHAT if is_chat else {"echo", "truncate_prompt_tokens", "add_special_tokens"}
        passed = {name: value for name, value in fields.items() if name not in dropped}
        if is_chat:
            passed.pop("logprobs", None)
        story.resume(kept=len(kept), is_other_kind=is_chat, counts_as_prompt=True)
        return msgspec.json.encode({**passed, **told})

    async def _told_ids(self, replica: ReplicaAddress) -> Sequence[int]:
        """The first of the output's ids, as many as make the text that the client has: its tokenizer is asked."""
        ids, text = self._story.token_ids, "".join(self._story.texts)
        context = self._story.prompt_ids[-_CONTEXT:]
        before = await self._text(replica, context)
        for dropped in range(min(len(ids), _CONTEXT) + 1):
            kept = ids[: len(ids) - dropped]
            if await self._text(replica, [*context, *kept]) == before + text:
                return kept
            if await self._text(replica, kept) == text:
                return kept
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
            found: dict[str, Any] = msgspec.json.decode(answer, type=dict[str, Any])
        except (OSError, msgspec.MsgspecError) as problem:
            raise UpstreamFailure("resume", f"{path} of a replica failed: {problem}.") from None
        if status != 200:
            raise UpstreamFailure("resume", f"{path} of a replica answers {status}.")
        return found
