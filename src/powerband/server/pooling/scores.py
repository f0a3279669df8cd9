"""Scores of pairs of texts: a cross-encoder reads both at once; of embeddings it is the cosine of two vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import Receive

from powerband.core.params import PoolingParams
from powerband.engine.client.vectors import as_rows, cosine
from powerband.errors import InvalidRequest
from powerband.server.pooling.protocol import PoolingUsage, ScoringRequest
from powerband.server.pooling.run import PoolingRun
from powerband.server.pooling.texts import check_tokens, check_total, cut_at, encode_pairs, encode_texts
from powerband.server.replica import Model, ServerState
from powerband.spec.model.pooling import PoolingSpec

_EMBEDDING = PoolingParams(use_activation=False)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Texts to compare, with the names of their fields for errors. `first` has one text, or as many as `second`."""

    first: list[str]
    second: list[str]
    names: tuple[str, str]
    prompts: tuple[str, str] = ("", "")  # of an embedding model, before the texts of each side

    def check(self) -> None:
        if len(self.first) not in (1, len(self.second)):
            one, other = self.names
            raise InvalidRequest(
                f"'{one}' has {len(self.first)} texts and '{other}' {len(self.second)}.",
                hint=f"Send one '{one}', or as many as there are of '{other}'.",
                param=one,
            )


@dataclass(frozen=True, slots=True)
class Scores:
    id: str
    created_s: int
    values: list[float]
    usage: PoolingUsage


async def score(
    replica: ServerState, model: Model, pooling: PoolingSpec, body: ScoringRequest, pairs: Pairs, receive: Receive
) -> Scores:
    """One score for each pair. Raises InvalidRequest, and what PoolingRun raises."""
    pairs.check()
    if pooling.task == "classify":
        return await _by_cross_encoder(replica, model, pooling, body, pairs, receive)
    if body.use_activation is not None:
        raise InvalidRequest("'use_activation' has no effect with an embedding model.", param="use_activation")
    cut = cut_at(model, body.truncate_prompt_tokens)
    tokens: list[list[int]] = []
    for texts, name, prompt in zip((pairs.first, pairs.second), pairs.names, pairs.prompts, strict=True):
        found = await encode_texts(replica, model, pooling, [prompt + text for text in texts], cut=cut)
        for index, ids in enumerate(found):
            check_tokens(ids, model, f"{name}.{index}" if len(found) > 1 else name)
        tokens += found
    check_total(tokens, replica.engine_settings, pairs.names[1])
    run = PoolingRun(replica, body, tokens, [_EMBEDDING] * len(tokens))
    vectors = as_rows(await run.vectors(receive))
    first, second = vectors[: len(pairs.first)], vectors[len(pairs.first) :]
    return Scores(run.id, run.created_s, cosine(first, second), run.usage())


async def _by_cross_encoder(
    replica: ServerState, model: Model, pooling: PoolingSpec, body: ScoringRequest, pairs: Pairs, receive: Receive
) -> Scores:
    pooling.check_scores()
    first = pairs.first * len(pairs.second) if len(pairs.first) == 1 else pairs.first
    texts = list(zip(first, pairs.second, strict=True))
    encoded = await encode_pairs(replica, model, texts, cut_at(model, body.truncate_prompt_tokens))
    tokens = [ids for ids, _ in encoded]
    name = pairs.names[1]
    for index, ids in enumerate(tokens):
        check_tokens(ids, model, f"{name}.{index}" if len(tokens) > 1 else name)
    check_total(tokens, replica.engine_settings, name)
    params = _params_of([start for _, start in encoded], body.use_activation)
    run = PoolingRun(replica, body, tokens, params)
    values: list[float] = as_rows(await run.vectors(receive))[:, 0].tolist()
    return Scores(run.id, run.created_s, values, run.usage())


def _params_of(starts: Sequence[int | None], use_activation: bool | None) -> list[PoolingParams]:
    """Equal ones are one object, which crosses to the engine once."""
    made = {start: PoolingParams(second_text_start=start, use_activation=use_activation) for start in set(starts)}
    return [made[start] for start in starts]
