"""A request: what a client asks for (EngineRequest), and what the scheduler knows about it while it lives (Request)."""

from __future__ import annotations

import hashlib
import math
import sys
from array import array
from dataclasses import dataclass, field
from typing import Any

from powerband.core.params import PoolingParams, SamplingParams
from powerband.errors import InvalidRequest
from powerband.spec.model.model_spec import RopeSpec
from powerband.spec.model.rope import rope_length

OUTPUT_COMPLETE = "output_complete"  # the code of what is refused because it resumes an output that has ended


@dataclass(slots=True, kw_only=True)
class EngineRequest:
    """One request as the engine takes it: token ids only, `params` complete (see SamplingParams), n = 1."""

    id: str  # unique among live requests, which the sender sees to: outputs are addressed by it
    token_ids: list[int]
    params: SamplingParams
    arrival_s: float  # time.monotonic()
    priority: int = 0  # lower is served first
    tenant: str = ""
    deadline_s: float | None = None  # time.monotonic() by which the first token is wanted
    cache_salt: str = ""
    adapter: str = ""  # digest of the adapter that the model is to compute with; "": none
    resumed_ids: list[int] = field(default_factory=list)  # output that it has already, from a replica that is gone
    pooling: PoolingParams | None = None  # one vector for the prompt instead of output; `params` are then not looked at


@dataclass(slots=True, eq=False)
class Request:
    """A live request inside the scheduler. Equal only to itself.

        position   0 ........ num_computed ........ len(tokens) ........ + num_pending
                   |- KV exists* -|-- missing, known --|-- missing, known on the device only --|

    (*) once every submitted step has run.
    """

    id: str
    arrival_s: float
    params: SamplingParams
    pooling: PoolingParams | None
    priority: int
    tenant: str
    deadline_s: float | None
    adapter: str
    salt: bytes  # start of the key chain: requests with different salts share no block
    tokens: list[int]  # prompt and every confirmed output token
    num_prompt_tokens: int
    max_length: int  # prompt and output together; one more than the prompt where that is only pooled
    stop_ids: frozenset[int]
    epoch: int  # unique among all requests of a scheduler; renewed by preemption
    order: tuple[Any, ...] = ()  # the policy's key, as of the last sorting
    running: bool = False
    uses_prefix_cache: bool = True  # False: every position of its prompt must be computed
    waits_for_token: bool = False  # what may come next depends on the last token, which must be known first
    rope_length: int = 0  # its keys are rotated by at least this length (spec.rope.rope_length)
    max_rotated: int = sys.maxsize  # tokens that keys rotated so are right for; with more, all are computed again
    num_computed: int = 0  # positions whose KV exists once every submitted step has run
    num_pending: int = 0  # sampled positions submitted whose value is not known here yet, drafts included
    inflight: int = 0  # submitted steps that sample for this request
    drafting: bool = False  # one of them carries drafts
    blocks: list[int] = field(default_factory=list)
    num_passed: int = 0  # leading blocks that lie before every window: of these only full layers hold pages
    capacity: int = 0  # positions that `blocks` can hold
    block_keys: list[bytes] = field(default_factory=list)  # one per full block of confirmed tokens
    num_published: int = 0  # leading blocks already offered to the prefix cache
    max_published: int = sys.maxsize  # blocks from here on must not be offered: their content is in doubt
    num_cached: int = 0  # prompt tokens found in the prefix cache when first scheduled
    num_preemptions: int = 0
    scheduled_s: float | None = None  # when first scheduled
    num_prompt_rows: int = 0  # rows of prompt log-probabilities already reported

    @property
    def num_missing(self) -> int:
        """Known or promised positions without KV. Bringing this to zero is the scheduler's whole job."""
        return len(self.tokens) + self.num_pending - self.num_computed

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens


def new_request(source: EngineRequest, *, max_length: int, epoch: int, pools_every_position: bool = False) -> Request:
    """Make the live form of `source`. `max_length`: prompt and output may never exceed it.

    pools_every_position: the model's vectors are made of all positions of a prompt. Raises InvalidRequest for values
    that could not be scheduled.
    """
    params = source.params
    _check(source)
    _check_resumed(source)
    if source.pooling is not None:
        max_length = len(source.token_ids) + 1  # nothing is ever scheduled after its prompt
    asked = sys.maxsize if params.max_tokens is None else params.max_tokens
    eos = () if params.ignore_eos else (params.eos_token_ids or ())
    return Request(
        id=source.id,
        arrival_s=source.arrival_s,
        params=params,
        pooling=source.pooling,
        priority=source.priority,
        tenant=source.tenant,
        deadline_s=source.deadline_s,
        adapter=source.adapter,
        salt=cache_root(source.tenant, source.cache_salt, source.adapter),
        tokens=[*source.token_ids, *source.resumed_ids],
        num_prompt_tokens=len(source.token_ids),
        max_length=min(len(source.token_ids) + asked, max_length),
        stop_ids=frozenset(eos) | frozenset(params.stop_token_ids or ()),
        epoch=epoch,
        uses_prefix_cache=_uses_prefix_cache(source, pools_every_position),
        waits_for_token=params.grammar is not None,
    )


def _uses_prefix_cache(source: EngineRequest, pools_every_position: bool) -> bool:
    """What is found in the cache is not computed, so it has neither log-probabilities nor a share in a mean."""
    if source.pooling is not None:
        return not pools_every_position
    return source.params.prompt_logprobs is None


def cache_root(tenant: str, cache_salt: str, adapter: str = "") -> bytes:
    """The key before a chain's first block. Lengths are hashed too, so that ("a", "bc") and ("ab", "c") differ.

    An adapter changes the keys and values of every position, so that its blocks are found by its requests only.
    """
    parts = [part.encode() for part in (tenant, cache_salt, *([adapter] if adapter else ()))]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()


def rotate_for(r: Request, rope: RopeSpec | None) -> None:
    """Choose how the keys of a request that has no blocks are rotated: with other rotations it shares no blocks."""
    length = rope_length(rope, r.num_prompt_tokens, len(r.tokens))
    if length != r.rope_length:
        r.rope_length = length
        r.salt = hashlib.sha256(r.salt + length.to_bytes(8, "little")).digest()
        r.block_keys = []
    if rope is not None and rope.scaling == "longrope" and not length:
        r.max_rotated = rope.original_max_position
    else:
        r.max_rotated = sys.maxsize


def _check(source: EngineRequest) -> None:
    if not source.token_ids:
        raise InvalidRequest(
            f"Request {source.id!r} has an empty prompt.", hint="Send at least one token.", param="prompt"
        )
    try:
        array("I", source.token_ids)
        array("I", source.resumed_ids)
    except (TypeError, OverflowError) as error:
        raise InvalidRequest(
            f"The prompt or what is resumed has something other than token ids from 0 to 2**32 - 1: {error}.",
            hint="Send a list of token ids of the model's vocabulary.",
            param="prompt",
        ) from None
    if source.params.n != 1:
        raise InvalidRequest(
            f"The engine takes n = 1, not n = {source.params.n}.", hint="Send one request per choice.", param="n"
        )
    max_tokens = source.params.max_tokens
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {max_tokens}; it must be at least 1.", param="max_tokens")
    for name, value in (("arrival_s", source.arrival_s), ("deadline_s", source.deadline_s)):
        if value is not None and not math.isfinite(value):
            raise InvalidRequest(f"{name} is {value}; it must be a finite time in seconds.", param=name)


def _check_resumed(source: EngineRequest) -> None:
    """Raise InvalidRequest if the output to resume is already complete, or if there can be none."""
    if source.pooling is not None and source.resumed_ids:
        raise InvalidRequest("A prompt that is pooled has no output to resume.", param="resume_token_ids")
    given, params = len(source.resumed_ids), source.params
    if params.max_tokens is not None and given >= params.max_tokens:
        raise InvalidRequest(
            f"{given} tokens are to be resumed, but max_tokens is {params.max_tokens}: the output is complete.",
            param="resume_token_ids",
            code=OUTPUT_COMPLETE,
        )
    ends = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else params.eos_token_ids or ())}
    if given > params.min_tokens and source.resumed_ids[-1] in ends:
        raise InvalidRequest(
            f"The last token to be resumed, {source.resumed_ids[-1]}, ended the output.",
            param="resume_token_ids",
            code=OUTPUT_COMPLETE,
        )
