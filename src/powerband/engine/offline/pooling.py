"""`LLM.embed` and `LLM.score`: prompts that are pooled, in vLLM's shape. No torch here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from powerband.core.params import PoolingParams, SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.step import TokenOutput
from powerband.engine.client.messages import EngineInfo, RemoteError
from powerband.engine.client.vectors import as_rows, cosine
from powerband.engine.offline.prompts import Prompt, as_list, errors_naming, text_or_tokens
from powerband.errors import InvalidRequest, RequestTooLong
from powerband.spec.model.pooling import PoolingSpec
from powerband.text.tokenizer import Tokenizer

_NO_OUTPUT = SamplingParams(max_tokens=1)

Run = Callable[[list[EngineRequest], bool], list[TokenOutput]]  # (requests, whether to show progress), in order


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    embedding: list[float]


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """One prompt and its vector."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int
    finished: bool = True


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    score: float


@dataclass(frozen=True, slots=True)
class ScoringRequestOutput:
    """A pair of texts and its score. prompt_token_ids: of both."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]
    finished: bool = True


class OfflinePooling:
    """Knows one engine's model and tokenizer. `run` carries requests out; `new_id` makes their ids."""

    def __init__(self, info: EngineInfo, tokenizer: Tokenizer | None, new_id: Callable[[], str], run: Run) -> None:
        self._info = info
        self._tokenizer = tokenizer
        self._new_id = new_id
        self._run = run

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: PoolingParams | None,
        *,
        show_progress: bool,
        truncate: int | None,
        prompt_name: str | None,
    ) -> list[EmbeddingRequestOutput]:
        pooling = self._pooling("embed")
        params = params or PoolingParams()
        pooling.check_dimensions(params.dimensions)
        prompt = pooling.prompt(prompt_name)
        tokens = []
        for index, source in enumerate(as_list(prompts)):
            with errors_naming(f"Prompt {index}"):
                text, ids = text_or_tokens(source)
                tokens.append(self._tokens(pooling, prompt + (text or ""), truncate) if ids is None else ids)
                self._check(tokens[-1])
        outputs = self._outputs(tokens, [params] * len(tokens), show_progress)
        return [
            EmbeddingRequestOutput(
                output.id, EmbeddingOutput(as_rows([vector])[0].tolist()), ids, output.num_cached_tokens
            )
            for (output, vector), ids in zip(outputs, tokens, strict=True)
        ]

    def score(
        self, data_1: str | Sequence[str], data_2: str | Sequence[str], *, show_progress: bool, truncate: int | None
    ) -> list[ScoringRequestOutput]:
        pooling = self._pooling("score")
        first, second = ([data] if isinstance(data, str) else list(data) for data in (data_1, data_2))
        if not second or len(first) not in (1, len(second)):
            raise InvalidRequest(
                f"data_1 has {len(first)} texts and data_2 {len(second)}; give one, or as many as there are.",
                param="data_1",
            )
        if pooling.task == "classify":
            return self._cross_encode(pooling, first, second, show_progress, truncate)
        tokens = []
        for name, texts in (("data_1", first), ("data_2", second)):
            for index, text in enumerate(texts):
                with errors_naming(f"{name}, text {index}"):
                    tokens.append(self._tokens(pooling, text, truncate))
                    self._check(tokens[-1])
        raw = PoolingParams(use_activation=False)
        vectors = as_rows([vector for _, vector in self._outputs(tokens, [raw] * len(tokens), show_progress)])
        values = cosine(vectors[: len(first)], vectors[len(first) :])
        ones = tokens[: len(first)] * (len(second) if len(first) == 1 else 1)
        pairs = zip(values, ones, tokens[len(first) :], strict=True)
        return [ScoringRequestOutput(self._new_id(), ScoringOutput(value), a + b) for value, a, b in pairs]

    def _cross_encode(
        self, pooling: PoolingSpec, first: list[str], second: list[str], show_progress: bool, truncate: int | None
    ) -> list[ScoringRequestOutput]:
        pooling.check_scores()
        tokens, params = [], []
        pairs = zip(first * len(second) if len(first) == 1 else first, second, strict=True)
        for index, (one, other) in enumerate(pairs):
            with errors_naming(f"Pair {index}"):
                ids, start = self._need_tokenizer().encode_pair(one, other, max_tokens=self._cut(truncate))
                self._check(ids)
            tokens.append(ids)
            params.append(PoolingParams(second_text_start=start))
        outputs = self._outputs(tokens, params, show_progress)
        return [
            ScoringRequestOutput(output.id, ScoringOutput(float(as_rows([vector])[0, 0])), ids)
            for (output, vector), ids in zip(outputs, tokens, strict=True)
        ]

    def _outputs(
        self, tokens: list[list[int]], params: list[PoolingParams], show_progress: bool
    ) -> list[tuple[TokenOutput, bytes]]:
        """Each prompt's output with its vector. Raises the error of the first one that failed."""
        requests = [
            EngineRequest(id=self._new_id(), token_ids=ids, params=_NO_OUTPUT, arrival_s=time.monotonic(), pooling=own)
            for ids, own in zip(tokens, params, strict=True)
        ]
        found = []
        for index, output in enumerate(self._run(requests, show_progress)):
            if output.error is not None or output.vector is None:
                with errors_naming(f"Prompt {index}"):
                    raise RemoteError(output.error) if output.error else InvalidRequest("It was aborted.")
            found.append((output, output.vector))
        return found

    def _tokens(self, pooling: PoolingSpec, text: str, truncate: int | None) -> list[int]:
        text = text.lower() if pooling.lowercase else text
        return self._need_tokenizer().encode(text, max_tokens=self._cut(truncate))

    def _cut(self, truncate: int | None) -> int | None:
        limit = self._info.max_model_len
        return limit if truncate == -1 else truncate if truncate is None else min(truncate, limit)

    def _check(self, ids: list[int]) -> None:
        if not ids:
            raise InvalidRequest("It has no tokens.", param="prompts")
        wrong = next((id for id in ids if not 0 <= id < self._info.vocab_size), None)
        if wrong is not None:
            last = self._info.vocab_size - 1
            raise InvalidRequest(f"It has token {wrong}; the vocabulary has tokens 0 to {last}.", param="prompts")
        limit = self._info.max_model_len
        if len(ids) > limit:
            hint = "Shorten it, or give truncate_prompt_tokens=-1."
            message = f"It has {len(ids)} tokens; the model takes {limit}."
            raise RequestTooLong(message, limit=limit, hint=hint, param="prompts")

    def _need_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidRequest(
                "It is text, but the model has no tokenizer.", hint="Give token ids.", code="no_tokenizer"
            )
        return self._tokenizer

    def _pooling(self, task: str) -> PoolingSpec:
        pooling = self._info.pooling
        if pooling is None or (task == "embed" and pooling.task != "embed"):
            raise InvalidRequest(
                f"This model gives no {'embeddings' if task == 'embed' else 'scores'}.", code="model_does_not_embed"
            )
        return pooling
