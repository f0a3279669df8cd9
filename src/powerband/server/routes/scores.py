"""/v1/score and /v1/rerank, with the other paths under which vLLM, Jina and Cohere have them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from powerband.errors import InvalidRequest
from powerband.server.pooling.protocol import (
    RankedDocument,
    Ranking,
    RerankDocument,
    RerankRequest,
    Score,
    ScoreList,
    ScoreRequest,
    Texts,
)
from powerband.server.pooling.scores import Pairs, score
from powerband.server.replica import ServerState
from powerband.web.errors import json_response


class ScoreRoutes:
    def __init__(self, replica: ServerState) -> None:
        self._replica = replica

    async def score(self, request: Request) -> Response:
        """How well texts go with each other."""
        replica = self._replica
        with replica.counting_refusals():
            body = await replica.read(request, ScoreRequest)
            replica.check_name(body.model)
            model, pooling = replica.accept_pooling("score")
            first, first_name = _side(body.text_1, body.data_1, "1")
            second, second_name = _side(body.text_2, body.data_2, "2")
            pairs = Pairs(first, second, (first_name, second_name))
            scores = await score(replica, model, pooling, body, pairs, request.receive)
        data = [Score(index=index, score=value) for index, value in enumerate(scores.values)]
        id = f"score-{scores.id}"
        return json_response(
            ScoreList(id=id, created=scores.created_s, model=replica.name, data=data, usage=scores.usage)
        )

    async def rerank(self, request: Request) -> Response:
        """Documents in the order in which they answer a query."""
        replica = self._replica
        with replica.counting_refusals():
            body = await replica.read(request, RerankRequest)
            replica.check_name(body.model)
            model, pooling = replica.accept_pooling("score")
            if body.max_tokens_per_doc is not None:
                if body.truncate_prompt_tokens is not None:
                    raise InvalidRequest("It means the same as 'truncate_prompt_tokens'.", param="max_tokens_per_doc")
                body.truncate_prompt_tokens = body.max_tokens_per_doc
            texts = [item if isinstance(item, str) else item.text for item in body.documents]
            prompts = (pooling.side_prompt("query"), pooling.side_prompt("document"))
            pairs = Pairs([body.query], texts, ("query", "documents"), prompts)
            scores = await score(replica, model, pooling, body, pairs, request.receive)
        order = sorted(range(len(texts)), key=lambda index: -scores.values[index])[: body.top_n or None]
        results = [RankedDocument(index=index, relevance_score=scores.values[index]) for index in order]
        if body.return_documents is not False:
            for result in results:
                result.document = RerankDocument(texts[result.index])
        return json_response(Ranking(id=f"rerank-{scores.id}", model=replica.name, usage=scores.usage, results=results))


def _side(text: Texts | None, data: Texts | None, number: str) -> tuple[list[str], str]:
    """The texts of one side, and the name of their field."""
    if text is not None and data is not None:
        raise InvalidRequest(f"'text_{number}' and 'data_{number}' mean the same: send one.", param=f"data_{number}")
    found, name = (text, f"text_{number}") if data is None else (data, f"data_{number}")
    if found is None:
        raise InvalidRequest(f"'{name}' is missing.", param=name)
    return ([found] if isinstance(found, str) else found), name
