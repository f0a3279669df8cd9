"""The token usage in responses that are passed through, under the names of all their APIs."""

from __future__ import annotations

import msgspec

from powerband.openai.chunks import ChunkUsage, ChunkUsageDetails, Count


class ReportedUsage(msgspec.Struct, gc=False):
    """OpenAI: prompt_tokens, completion_tokens. Responses, Messages: input_tokens, output_tokens. Reranking: in some
    engines only total_tokens.
    """

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    total_tokens: Count | None = None
    prompt_tokens_details: ChunkUsageDetails | None = None
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    input_tokens_details: ChunkUsageDetails | None = None
    cache_read_input_tokens: Count | None = None  # at Anthropic, in addition to input_tokens
    cache_creation_input_tokens: Count | None = None  # likewise

    def after(self, earlier: ReportedUsage | None) -> ReportedUsage:
        """With what only an earlier usage has: Anthropic counts the prompt first, the output last."""
        if earlier is None:
            return self
        return ReportedUsage(*(getattr(self, name) or getattr(earlier, name) for name in self.__struct_fields__))

    def as_chunk_usage(self) -> ChunkUsage:
        output = self.output_tokens or self.completion_tokens or 0
        anthropic_cached = self.cache_read_input_tokens or 0
        if self.input_tokens is not None:
            prompt = self.input_tokens + anthropic_cached + (self.cache_creation_input_tokens or 0)
        elif self.prompt_tokens is not None:
            prompt = self.prompt_tokens
        else:
            prompt = max(0, (self.total_tokens or 0) - output)
        details = self.input_tokens_details or self.prompt_tokens_details
        cached = anthropic_cached or (details.cached_tokens if details is not None else None)
        return ChunkUsage(prompt, output, ChunkUsageDetails(cached))
