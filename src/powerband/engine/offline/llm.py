"""`powerband.LLM`: an engine in this process, for scripts. Prompts in, results in order out, as with vLLM's class."""

from __future__ import annotations

import difflib
import itertools
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import TracebackType
from typing import Any

import msgspec

from powerband.core.clock import MonotonicClock
from powerband.core.loop import Abort, Add
from powerband.core.params import PoolingParams, SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.step import FinishReason, TokenOutput
from powerband.engine.build import build_engine
from powerband.engine.client.output_reader import OutputReader
from powerband.engine.offline.adapters import AdapterChoice, OfflineAdapters
from powerband.engine.offline.inbox import InterruptGuard, LocalInbox, RequestFeed
from powerband.engine.offline.pooling import EmbeddingRequestOutput, OfflinePooling, ScoringRequestOutput
from powerband.engine.offline.progress import ProgressBar
from powerband.engine.offline.prompts import Prompt, PromptReader, as_list, errors_naming, one_per_prompt
from powerband.engine.offline.results import Answer, PromptGroup, RequestOutput
from powerband.errors import EngineDead, InvalidRequest, UsageError
from powerband.openai.tools import Tool, ToolChoice
from powerband.output_parsers.formats import OutputFormat
from powerband.output_parsers.tool_use import ToolUse, tool_use
from powerband.spec.settings import EngineSettings
from powerband.text.chat_template import ChatTemplate
from powerband.text.tokenizer import Tokenizer
from powerband.text.tool_messages import check_tool_messages

logger = logging.getLogger(__name__)

Conversation = Sequence[Mapping[str, Any]]


class LLM:
    """A model ready to generate. Keyword arguments are the fields of EngineSettings.

    Not for several threads at once. Raises UsageError or EnvironmentFault when it cannot start.

        llm = LLM("demo", max_num_seqs=16)
        [result] = llm.generate("The list is", SamplingParams(temperature=0, max_tokens=8))
        result.outputs[0].text
    """

    def __init__(self, model: str = "demo", **settings: Any) -> None:
        _check_names(settings)
        asked = EngineSettings(model=model, **settings)
        self._inbox = LocalInbox()
        self._engine = build_engine(asked, inbox=self._inbox, clock=MonotonicClock())
        self.settings = self._engine.settings  # with every default that depends on model or machine filled in
        revision = asked.revision if asked.tokenizer is None else None
        info = self._engine.info
        self._tokenizer = Tokenizer.load(asked.tokenizer or info.model_folder, revision=revision)
        self.info = info.with_end(self._tokenizer.eos_token_id if self._tokenizer is not None else None)
        self._reader = PromptReader(self.info, self._tokenizer, self._engine.grammars)
        self._template: ChatTemplate | None = None
        registry = self._engine.adapters
        self._adapters = OfflineAdapters(
            info.adapters, registry.max_adapters, load=registry.load, unload=registry.remove
        )
        self._ids = map(str, itertools.count())
        self._pooling = OfflinePooling(self.info, self._tokenizer, lambda: next(self._ids), self._run_pooled)
        logger.info("%s", self.info.summary)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        lora_request: AdapterChoice = None,
    ) -> list[RequestOutput]:
        """Answer every prompt; results are in the order of the prompts.

        A prompt is text, a list of token ids, or vLLM's {"prompt": …} or {"prompt_token_ids": …}. `sampling_params` are
        for all, or one per prompt; default: `get_default_sampling_params()`. `use_tqdm`: show progress on stderr.
        `lora_request`: a LoRA adapter for all prompts, or one or None per prompt. A request that fails in the engine
        ends with finish_reason "error", alone. Raises InvalidRequest, naming the prompt, before anything starts;
        EngineDead; and KeyboardInterrupt on Ctrl-C, when everything has been aborted and the engine is ready for more.
        """
        return self._generate(
            as_list(prompts), sampling_params, None, use_tqdm=use_tqdm, priority=priority, lora_request=lora_request
        )

    def _generate(
        self,
        every_prompt: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        readers: Sequence[OutputReader] | None,
        *,
        use_tqdm: bool,
        priority: Sequence[int] | None = None,
        lora_request: AdapterChoice = None,
    ) -> list[RequestOutput]:
        self._check_generates()
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        every_params = one_per_prompt(params, len(every_prompt))
        every_priority = self._priorities(priority, len(every_prompt))
        adapters = self._adapters.digests(lora_request, len(every_prompt))
        groups = []
        for index, (prompt, own) in enumerate(zip(every_prompt, every_params, strict=True)):
            with errors_naming(f"Prompt {index}" if readers is None else f"Conversation {index}"):
                group = self._reader.read(
                    prompt,
                    own,
                    id=next(self._ids),
                    priority=every_priority[index],
                    adapter=adapters[index],
                    reader=None if readers is None else readers[index],
                )
                groups.append(group)
        self._run(groups, show_progress=use_tqdm)
        return [group.result(self._tokenizer) for group in groups]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: AdapterChoice = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        thinking_token_budget: int | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or several. Otherwise as `generate`.

        tools, tool_choice, parallel_tool_calls: as in OpenAI's API. Outputs have `content`, `reasoning_content` and
        `tool_calls`, read in the model's format; where that is not known, calls stay text. thinking_token_budget:
        maximum tokens of reasoning, after which the text that ends it is added in the model's place; -1: no limit.
        """
        template = self._need_template()
        use = _tools(tools, tool_choice, parallel_tool_calls)
        format = OutputFormat.of(template.source, self.settings.tool_call_parser, self.settings.reasoning_parser)
        budget = _budget(thinking_token_budget, format)
        prompts: list[Prompt] = []
        readers: list[OutputReader] = []
        for index, conversation in enumerate(_conversations(messages)):
            with errors_naming(f"Conversation {index}"):
                check_tool_messages(conversation)
                text = template.render(
                    conversation,
                    tools=use.for_template if use is not None else None,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    template_kwargs=chat_template_kwargs,
                    tools_in_text=format.writes_tools_in_text,
                )
            prompts.append({"prompt": text, "prompt_token_ids": self._encode_rendered(text)})
            readers.append(OutputReader(format, text, use if format.tools else None, budget=budget))
        return self._generate(prompts, sampling_params, readers, use_tqdm=use_tqdm, lora_request=lora_request)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        truncate_prompt_tokens: int | None = None,
        prompt_name: str | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """One vector for each prompt, in their order; prompts are given as to `generate`.

        `truncate_prompt_tokens`: keep the first of a text; -1: as many as the model takes. `prompt_name`: one of the
        checkpoint's prompts, to put before each text. Raises InvalidRequest, naming the prompt, and as `generate`.
        """
        return self._pooling.embed(
            prompts, pooling_params, show_progress=use_tqdm, truncate=truncate_prompt_tokens, prompt_name=prompt_name
        )

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        use_tqdm: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well texts go with each other: one of `data_1` with all of `data_2`, or each with its counterpart.

        A cross-encoder reads both at once; of an embedding model it is the cosine of two vectors. Raises as `embed`.
        """
        return self._pooling.score(data_1, data_2, show_progress=use_tqdm, truncate=truncate_prompt_tokens)

    def get_default_sampling_params(self) -> SamplingParams:
        """What counts where no sampling_params are given: generation_config.json's, as `generation_config` has it."""
        return SamplingParams(**self.info.sampling_defaults)  # type: ignore[arg-type]  # checked when they were read

    def get_tokenizer(self) -> Tokenizer | None:
        """None when the checkpoint has none; then prompts are token ids."""
        return self._tokenizer

    def reset_prefix_cache(self) -> None:
        """Forget the KV of earlier prompts."""
        self._engine.scheduler.reset_prefix_cache()

    def close(self) -> None:
        """End the engine's threads and processes. The object cannot be used afterwards."""
        if self._template is not None:
            self._template.close()
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, groups: list[PromptGroup], show_progress: bool) -> None:
        """Feed the engine, no faster than its queue takes, until every answer is finished."""
        feed = RequestFeed(
            groups,
            max_live=self.settings.max_num_seqs + self.settings.max_num_queued_reqs,
            share_prompts=self.settings.enable_prefix_caching,
        )
        with ProgressBar(feed.num_left, shown=show_progress) as progress, InterruptGuard() as interruptions:
            try:
                while feed.num_left:
                    self._inbox.commands += [Add(answer.request) for answer in feed.take()]
                    self._distribute(self._engine.core.step(), feed, progress)
                    if interruptions.num_seen:
                        raise KeyboardInterrupt
            except EngineDead:
                raise
            except BaseException:
                self._inbox.commands += [Abort(id) for id in feed.live]
                self._settle()
                raise
            self._settle()

    def _distribute(self, outputs: list[TokenOutput], feed: RequestFeed, progress: ProgressBar) -> None:
        """Add the outputs of a step to their answers."""
        refused = []
        finished = tokens_in = tokens_out = 0
        for output in outputs:
            if output.id not in feed.live:  # it met a stop string, and this was under way
                continue
            if output.error is not None and output.error.code == "queue_full":
                refused.append(output.id)
                continue
            group, answer = feed.live[output.id]
            before = len(answer.token_ids)
            self._add(answer, output, feed)
            if answer.finished or answer.token_ids:
                feed.advance(group, answer)
            tokens_out += len(answer.token_ids) - before
            if answer.finished:
                finished += 1
                tokens_in += len(group.prompt_ids)
        feed.refuse(refused)
        progress.advance(finished=finished, tokens_in=tokens_in, tokens_out=tokens_out)

    def _add(self, answer: Answer, output: TokenOutput, feed: RequestFeed) -> None:
        for part in answer.reader.parts(output):
            answer.add(part)
            is_continued = answer.end_reasoning(self._tokenizer)
            if answer.last.must_abort:
                self._inbox.commands.append(Abort(output.id, FinishReason.STOP))
            elif is_continued:
                feed.continue_as(output.id, answer)
                self._inbox.commands += [Abort(output.id), Add(answer.request)]
                return

    def _run_pooled(self, requests: list[EngineRequest], show_progress: bool) -> list[TokenOutput]:
        """Feed the engine, no faster than it runs requests, until every prompt has been pooled; outputs in order."""
        waiting = deque(requests)
        done: dict[str, TokenOutput] = {}
        live: dict[str, EngineRequest] = {}
        with ProgressBar(len(requests), shown=show_progress) as progress, InterruptGuard() as interruptions:
            try:
                while len(done) < len(requests):
                    while waiting and len(live) < self.settings.max_num_seqs:
                        request = waiting.popleft()
                        live[request.id] = request
                        self._inbox.commands.append(Add(request))
                    finished = {output.id: output for output in self._engine.core.step() if output.id in live}
                    num_tokens = sum(len(live.pop(id).token_ids) for id in finished)
                    done |= finished
                    progress.advance(finished=len(finished), tokens_in=num_tokens, tokens_out=0)
                    if interruptions.num_seen:
                        raise KeyboardInterrupt
            except EngineDead:
                raise
            except BaseException:
                self._inbox.commands += [Abort(id) for id in live]
                self._settle()
                raise
        return [done[request.id] for request in requests]

    def _check_generates(self) -> None:
        if not self.info.generates:
            raise InvalidRequest(
                "This model pools prompts and does not generate.",
                hint="Use embed or score.",
                code="model_does_not_generate",
            )

    def _settle(self) -> None:
        """Carry out what is still to be aborted, and wait for the steps in flight."""
        while self._inbox.commands or self._engine.core.busy:
            self._engine.core.step()

    def _priorities(self, priority: Sequence[int] | None, count: int) -> list[int]:
        if priority is None:
            return [0] * count
        if self.settings.scheduling_policy != "priority":
            raise UsageError(
                f"priority has no effect with scheduling_policy '{self.settings.scheduling_policy}'.",
                hint="Make the LLM with scheduling_policy='priority'.",
                param="priority",
            )
        if len(priority) != count or not all(type(item) is int for item in priority):
            raise InvalidRequest(f"priority must be {count} whole numbers, one per prompt.", param="priority")
        return list(priority)

    def _need_template(self) -> ChatTemplate:
        if self._template is None and self._tokenizer is not None:
            self._template = ChatTemplate.load(self._tokenizer, self.settings.chat_template)
        if self._template is None:
            raise InvalidRequest(
                "The model has no chat template.",
                hint="Use generate, or give a template with chat_template=FILE.",
                code="no_chat_template",
                param="messages",
            )
        return self._template

    def _encode_rendered(self, text: str) -> list[int]:
        """Templates write the special tokens themselves."""
        return [] if self._tokenizer is None else self._tokenizer.encode(text, add_special_tokens=False)


def _tools(
    tools: Sequence[Mapping[str, Any]] | None, choice: str | Mapping[str, Any] | None, parallel: bool | None
) -> ToolUse | None:
    """Raises InvalidRequest naming the place."""
    try:
        read = msgspec.convert(tools, list[Tool] | None)
        chosen = msgspec.convert(choice, ToolChoice | None)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"tools or tool_choice are not as in OpenAI's API: {error}.", param="tools") from None
    return tool_use(read, chosen, parallel)


def _budget(budget: int | None, format: OutputFormat) -> int | None:
    """Raises InvalidRequest for one without effect."""
    if budget is None or budget == -1:
        return None
    if type(budget) is not int or budget < 0:
        raise InvalidRequest(
            f"thinking_token_budget is {budget!r}; it must be a whole number of at least 0, or -1.",
            param="thinking_token_budget",
        )
    if not format.reasoning:
        raise InvalidRequest(
            "thinking_token_budget has no effect: no reasoning is recognized in this model's answers.",
            hint="Leave it out, or name the format with reasoning_parser.",
            param="thinking_token_budget",
            code="unsupported_parameter",
        )
    return budget


def _conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """One conversation or several as a list. Raises InvalidRequest."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequest(
            f"messages are given as {type(messages).__name__}.",
            hint="Give a list of messages, such as [{'role': 'user', 'content': '…'}], or a list of such lists.",
            param="messages",
        )
    single: list[Mapping[str, Any]] = []
    several: list[Conversation] = []
    for item in messages:
        if isinstance(item, Mapping):
            single.append(item)
        else:
            several.append(item)
    if single and several:
        raise InvalidRequest("messages mixes messages and conversations.", hint="Give one kind.", param="messages")
    return [single] if single else several


def _check_names(settings: Mapping[str, Any]) -> None:
    known = [item.name for item in fields(EngineSettings)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(known)}."
            if name == "enable_lora":
                hint = "Leave it out: max_loras is enough."
            raise UsageError(f"LLM has no setting '{name}'.", hint=hint, param=name)
