"""From the arguments of `LLM` to the engine's requests: all checked before anything starts. No torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec

from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.structured_outputs import StructuredOutputsParams
from powerband.engine.client.messages import EngineInfo
from powerband.engine.client.output_reader import OutputReader
from powerband.engine.offline.results import Answer, PromptGroup
from powerband.errors import InvalidRequest, PowerbandError, RequestTooLong
from powerband.output_parsers.answer_grammar import answer_grammar
from powerband.structured.compiled import Grammars
from powerband.structured.specification import grammar_of
from powerband.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]


class PromptReader:
    """Knows one engine's vocabulary, context and tokenizer (None: prompts must be token ids)."""

    def __init__(self, info: EngineInfo, tokenizer: Tokenizer | None, grammars: Grammars | None = None) -> None:
        self._info = info
        self._grammars = grammars
        self._tokenizer = tokenizer
        self._known: dict[bytes, str] = {}  # the last specification's grammar: prompts in a row mostly share it

    def read(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        id: str,
        priority: int,
        adapter: str = "",
        reader: OutputReader | None = None,
    ) -> PromptGroup:
        """The requests for one prompt: n of them. Raises InvalidRequest or RequestTooLong.

        adapter: as `EngineRequest.adapter`. reader: of a chat's outputs.
        """
        text, ids = self._text_and_ids(prompt)
        self._check(ids)
        params = self._complete(params, len(ids), reader or OutputReader())
        answers = []
        rest = params if params.prompt_logprobs is None else replace(params, prompt_logprobs=None)
        for index in range(params.n):
            own = (params if index == 0 else rest).for_choice(index)  # only the first scores the prompt
            request = EngineRequest(
                id=id if params.n == 1 else f"{id}-{index}",
                token_ids=ids,
                params=own,
                arrival_s=time.monotonic(),
                priority=priority,
                adapter=adapter,
            )
            how = reader or OutputReader()
            answer = Answer(index, request, how.processor(self._tokenizer, own, ids), how, is_chat=reader is not None)
            answer.end_reasoning(self._tokenizer)  # a budget of 0, where the prompt has opened it
            answers.append(answer)
        return PromptGroup(id, text, ids, params, answers)

    def _text_and_ids(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        text, ids = text_or_tokens(prompt)
        return text, self._encode(text or "") if ids is None else ids

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise InvalidRequest(
                "It is text, but the model has no tokenizer.",
                hint="Give token ids, or name a tokenizer with tokenizer=….",
                code="no_tokenizer",
                param="prompts",
            )
        return self._tokenizer.encode(text)

    def _check(self, ids: list[int]) -> None:
        if not ids:
            raise InvalidRequest("It is empty.", hint="Give at least one token.", param="prompts")
        wrong = next((id for id in ids if not 0 <= id < self._info.vocab_size), None)
        if wrong is not None:
            last = self._info.vocab_size - 1
            raise InvalidRequest(f"It has token {wrong}; the vocabulary has tokens 0 to {last}.", param="prompts")
        limit = self._info.max_model_len - 1
        if len(ids) > limit:
            raise RequestTooLong(
                f"It has {len(ids)} tokens; the context of {limit + 1} takes {limit} and one output token.",
                limit=limit,
                hint="Shorten it, or raise max_model_len if the model allows it.",
                param="prompts",
            )

    def _complete(self, params: SamplingParams, num_prompt_tokens: int, reader: OutputReader) -> SamplingParams:
        """The parameters with all defaults filled in."""
        params.check_vocabulary(self._info.vocab_size)
        for name in ("stop", "bad_words"):
            if getattr(params, name) and self._tokenizer is None:
                raise InvalidRequest(f"{name} needs a tokenizer, and the model has none.", param=name)
        if self._tokenizer is not None:
            encode = self._tokenizer.encode
            params = params.with_bad_word_ids(lambda word: encode(word, add_special_tokens=False))
        outputs = params.structured_outputs
        form = "" if outputs is None else self._grammar(outputs)
        if self._tokenizer is not None and (form or reader.rules is not None):
            token_id = self._tokenizer.token_id
            made = answer_grammar(reader.format, reader.prompt, reader.rules, form, token_id, self._grammar)
            params = params.with_grammar(made)
        room = max(self._info.max_model_len - num_prompt_tokens, params.min_tokens)
        eos = self._info.eos_token_ids if params.eos_token_ids is None else params.eos_token_ids
        return replace(params, max_tokens=params.max_tokens or room, eos_token_ids=eos)

    def _grammar(self, outputs: StructuredOutputsParams, places: Mapping[str, str] | None = None) -> str:
        if self._tokenizer is None or self._grammars is None:
            raise InvalidRequest(
                "structured_outputs need a tokenizer, and the model has none.", param="structured_outputs"
            )
        key = msgspec.json.encode(outputs)
        if key not in self._known:
            grammar = grammar_of(outputs, self._grammars.tokens, places)
            self._grammars.prepare(grammar)
            self._known = {key: grammar}
        return self._known[key]


def text_or_tokens(prompt: Prompt) -> tuple[str | None, list[int] | None]:
    """A prompt's text and its token ids, each as far as it is given. Raises InvalidRequest."""
    text: Any = None
    ids: Any = None
    if isinstance(prompt, Mapping):
        if not prompt or prompt.keys() - {"prompt", "prompt_token_ids"}:
            raise InvalidRequest(
                f"It has the keys {sorted(map(str, prompt))}; known are 'prompt' and 'prompt_token_ids'.",
                param="prompts",
            )
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    elif isinstance(prompt, str):
        text = prompt
    else:
        ids = prompt
    if text is not None and not isinstance(text, str):
        raise InvalidRequest(f"Its text is {text!r}.", param="prompts")
    if ids is None:
        return text, None
    if not isinstance(ids, list | tuple) or not all(type(id) is int for id in ids):
        raise InvalidRequest("It must be text, or a list of token ids, which are whole numbers.", param="prompts")
    return text, list(ids)


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list. A list of numbers is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes | bytearray | memoryview) or not isinstance(prompts, Sequence):
        raise InvalidRequest(
            f"Prompts are given as {type(prompts).__name__}; give text, token ids, or a list of these.", param="prompts"
        )
    numbers = [item for item in prompts if isinstance(item, int)]
    if numbers and len(numbers) == len(prompts):
        return [numbers]
    every: list[Any] = list(prompts)
    return every


def one_per_prompt(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    """Parameters for each of `count` prompts. Raises InvalidRequest when their number differs."""
    if isinstance(params, SamplingParams):
        return [params] * count
    wrong = next((item for item in params if not isinstance(item, SamplingParams)), None)
    if wrong is not None:
        raise InvalidRequest(f"{wrong!r} is not a SamplingParams.", param="sampling_params")
    if len(params) != count:
        raise InvalidRequest(
            f"There are {count} prompts and {len(params)} sampling_params.",
            hint="Give one for all, or one per prompt.",
            param="sampling_params",
        )
    return list(params)


@contextmanager
def errors_naming(what: str) -> Iterator[None]:
    """Put the number of the input in front of an error's message."""
    try:
        yield
    except PowerbandError as error:
        error.message = f"{what}: {error.message}"
        raise
