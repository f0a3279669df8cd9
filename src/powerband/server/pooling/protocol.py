"""The requests and responses of /v1/embeddings: OpenAI's fields, and vLLM's extras under vLLM's names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from powerband.server.protocol import INT32, Label

MAX_INPUTS = 2048  # OpenAI's

_TOKEN = {"type": "integer", "minimum": 0, "maximum": INT32}
_TOKENS = {"type": "array", "items": _TOKEN, "minItems": 1}
INPUT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_INPUTS},
        _TOKENS,
        {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": MAX_INPUTS},
    ]
}
Truncate = Annotated[
    int, Meta(ge=-1, le=INT32, description="Keep only the first tokens of a text; -1: as many as the model takes")
]


class PoolingRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What all requests to pool have in common. null means the default, everywhere."""

    model: Annotated[str | None, Meta(description="Name of the served model; default: the only one there is")] = None
    user: Annotated[Label, Meta(description="The tenant of fair-share scheduling and of the prefix cache")] | None = (
        None
    )
    truncate_prompt_tokens: Truncate | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1, description="Lower is served first")] | None = None
    cache_salt: Label | None = None


class EmbeddingRequest(PoolingRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of /v1/embeddings."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=INT32, description="Keep only the first ones")] | None = None
    normalize: Annotated[bool, Meta(description="Vectors of length 1; default: as the checkpoint says")] | None = None
    add_special_tokens: bool | None = None
    prompt_name: (
        Annotated[Label, Meta(description="One of the checkpoint's prompts, to put before each text")] | None
    ) = None
    input_type: Annotated[Label, Meta(description="query or document: the checkpoint's prompt for these")] | None = None


class PoolingUsage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingObject(msgspec.Struct, kw_only=True):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: Annotated[list[float] | str, Meta(description="Numbers, or float32 in little-endian base64")]


class EmbeddingList(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[EmbeddingObject]
    usage: PoolingUsage


Texts = str | Annotated[list[str], Meta(min_length=1, max_length=MAX_INPUTS)]


class ScoringRequest(PoolingRequest, forbid_unknown_fields=True, kw_only=True):
    """What requests for scores have in common."""

    use_activation: Annotated[bool, Meta(description="false: a cross-encoder's raw scores")] | None = None


class ScoreRequest(ScoringRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of /v1/score: one text beside each of several, or as many on each side; data_1 and data_2 in newer vLLM."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None


class RerankDocument(msgspec.Struct, forbid_unknown_fields=True):
    text: str


class RerankRequest(ScoringRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of /v1/rerank: vLLM's, Jina's and Cohere's."""

    query: str
    documents: Annotated[list[str | RerankDocument], Meta(min_length=1, max_length=MAX_INPUTS)]
    top_n: Annotated[int, Meta(ge=0, le=INT32, description="Give only the best ones; 0: all")] | None = None
    return_documents: Annotated[bool, Meta(description="false: leave the texts out")] | None = None
    max_tokens_per_doc: Annotated[int, Meta(ge=1, le=INT32, description="As truncate_prompt_tokens")] | None = None


class Score(msgspec.Struct, kw_only=True):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreList(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: PoolingUsage


class RankedDocument(msgspec.Struct, kw_only=True):
    index: int
    document: RerankDocument | msgspec.UnsetType = msgspec.UNSET
    relevance_score: float


class Ranking(msgspec.Struct, kw_only=True):
    id: str
    model: str
    usage: PoolingUsage
    results: list[RankedDocument]
