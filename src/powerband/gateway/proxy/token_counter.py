"""Counts the tokens of one response: as its replicas report them, else as its events show them."""

from __future__ import annotations

from array import array

import msgspec
from msgspec import Raw

from powerband.gateway.proxy.interfaces import ProxiedRequest
from powerband.gateway.upstream.context_lengths import MAX_TOKENS
from powerband.gateway.upstream.token_estimates import TextTokenCount, TokenEstimates
from powerband.openai.chunks import NO_IDS, Chunk, ChunkUsage, count_ids, has_ids

_SLACK_TOKENS = 64  # engines differ in whether they count the end of a turn
_MAX_TOKEN_CHARS = 256  # the longest tokens of vocabularies are runs of 128 blanks


class TokenCounter:
    """num_output: output tokens that the events show, in all choices. usage: the latest that the replica reported.
    reasoning: the tokens of reasoning among the output, as a replica counted them; None: none counts them.

    token_ids: of all output, as far as replicas send them. times_s and counts: when how many output tokens came.
    """

    def __init__(self, client_request: ProxiedRequest, estimates: TokenEstimates | None) -> None:
        """estimates: of the model's responses, for tokens that the replica does not count."""
        self._client_request = client_request
        self.text = TextTokenCount(estimates or TokenEstimates())
        self.num_output = 0
        self.usage: ChunkUsage | None = None
        self.reasoning: int | None = None
        self.token_ids = array("q")  # an array, because there may be many
        self.has_missing_ids = False  # some output arrived without ids
        self.times_s = array("d")
        self.counts = array("q")
        self.prompt_ids = NO_IDS
        self.num_in_prompt = 0  # output tokens of earlier replicas, if the current one counts them as prompt
        self._prompt_sizes: dict[int, int] = {}  # tokens by prompt index, if replicas send the ids
        self._usage_of: dict[int, int] | None = None  # output tokens by choice, if chunks report them
        self._tokens_since_usage = 0  # output tokens received after the last usage
        self._chars_without_ids = 0
        self._max_generated = 0  # upper bound of what was requested

    def begin(self, *, reports_each_choice: bool) -> None:
        """The next events come from another replica. reports_each_choice: each chunk has its choice's usage."""
        limit = self._client_request.limit
        self._max_generated = (MAX_TOKENS if limit is None else limit) * self._client_request.num_choices
        self._usage_of = {} if reports_each_choice else None

    def resume(self, kept: int, *, counts_as_prompt: bool) -> None:
        """Only the first `kept` tokens stay. counts_as_prompt: the next replica counts them as prompt."""
        self.num_in_prompt = kept if counts_as_prompt else 0
        self.num_output -= len(self.token_ids) - kept
        self._chars_without_ids = 0
        self.usage, self._tokens_since_usage = None, self.num_output  # the next replica counts for itself
        del self.token_ids[kept:]

    @property
    def _has_several(self) -> bool:
        return self._client_request.num_choices > 1

    @property
    def has_too_many(self) -> bool:
        """Whether there are certainly more tokens than requested. Chunks prove nothing: some servers send letters."""
        min_generated = len(self.token_ids) + self._chars_without_ids // _MAX_TOKEN_CHARS
        return min_generated > self._max_generated + _SLACK_TOKENS

    # What the events show.

    def count(self, token_ids: list[int] | None, text: str | None) -> int:
        """Count a part of the output. Returns its tokens, which are passed to `add` with those of all its event."""
        if token_ids:
            self.token_ids.extend(token_ids)
            return len(token_ids)
        if text:
            self.has_missing_ids = True
            self._chars_without_ids += len(text)
            return self.text.add(text)
        return 0

    def add(self, tokens: int, now_s: float) -> None:
        self.times_s.append(now_s)
        self.counts.append(tokens)
        self.num_output += tokens

    def add_prompt_ids(self, ids: Raw, index: int | None = None) -> None:
        """Ids of the prompt. index: among several prompts."""
        if self.num_in_prompt or not has_ids(ids):
            return
        self.prompt_ids = ids
        if index is not None:
            self._prompt_sizes[index] = count_ids(ids)

    def add_usage(self, chunk: Chunk, tokens: int) -> None:
        """Take a chunk's usage; one with 0 output tokens is ignored. tokens: of the chunk, as counted here."""
        usage = chunk.usage
        if usage is not None and usage.reasoning_tokens is not None and not (chunk.choices and self._has_several):
            self.reasoning = usage.reasoning_tokens
        if usage is None or not usage.completion_tokens:
            self._tokens_since_usage += tokens
            if usage is not None and usage.prompt_tokens and self.usage is None:
                self.usage = usage
            return
        if chunk.choices and self._usage_of is not None:
            for choice in chunk.choices:
                self._usage_of[choice.index or 0] = usage.completion_tokens
            usage = msgspec.structs.replace(usage, completion_tokens=sum(self._usage_of.values()))
        self.usage, self._tokens_since_usage = usage, 0

    # The sums.

    def final_usage(self) -> tuple[int, int, int]:
        """Prompt, cached and output tokens: as replicas reported them, else as counted here (see `is_estimate`).

        Never more than the request's upper bound, because the client is charged for them.
        """
        cached = 0 if self.usage is None else self.usage.cached_tokens
        prompt = min(self.reported_prompt or self._client_request.prompt_tokens, self._client_request.max_prompt_usage)
        return prompt, min(cached, prompt), min(self._output, self.max_output)

    def teach(self, estimates: TokenEstimates, output: int, sent_s: float) -> None:
        """Refine the estimates with a complete response. output: its tokens, as the replica has counted them."""
        choices, times_s, is_stream = self._client_request.num_choices, self.times_s, self._client_request.is_stream
        estimates.output.observe(output / choices)
        if times_s:
            generated = output - self.counts[0] if is_stream else output
            begin_s = times_s[0] if is_stream else sent_s
            estimates.learn_pace(generated / choices, times_s[-1] - begin_s, has_prompt=not is_stream)
        if is_stream:
            estimates.learn_chunks(output, self.text.num_chunks)

    @property
    def is_estimate(self) -> bool:
        """Whether `final_usage` has counts that no replica reported."""
        prompt = self.reported_prompt
        is_counted = self._tokens_since_usage == 0 or not self.has_missing_ids
        is_possible = prompt <= self._client_request.max_prompt_usage and self._output <= self.max_output
        return not prompt or not is_counted or not is_possible

    @property
    def max_output(self) -> int:
        limit = self._client_request.limit
        return (MAX_TOKENS if limit is None else limit) * self._client_request.num_sequences

    @property
    def reported_prompt(self) -> int:
        """Tokens of all prompts; 0: no replica has reported them. The usage of one choice counts one prompt."""
        prompts, usage = self._client_request.num_prompts, self.usage
        if len(self._prompt_sizes) == prompts:
            return sum(self._prompt_sizes.values())
        if usage is not None and usage.prompt_tokens and not (self._usage_of and prompts > 1):
            return max(0, usage.prompt_tokens - self.num_in_prompt)
        return count_ids(self.prompt_ids) if prompts == 1 else 0

    @property
    def _output(self) -> int:
        usage = self.usage
        if usage is None or not usage.completion_tokens:
            return max(self.num_output, len(self.token_ids))
        return max(usage.completion_tokens + self.num_in_prompt + self._tokens_since_usage, len(self.token_ids))
