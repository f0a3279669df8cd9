"""How the outputs of one chat are read: a parser for each choice, and when its reasoning has to end."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from powerband.core.params import SamplingParams
from powerband.core.step import TokenLogprobs, TokenOutput
from powerband.engine.client.output import OutputProcessor
from powerband.output_parsers.formats import OutputFormat
from powerband.output_parsers.grammar import CallRules
from powerband.output_parsers.tool_use import ToolUse
from powerband.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class OutputReader:
    """prompt: as text. budget: the maximum number of reasoning tokens; None: no limit."""

    format: OutputFormat = field(default_factory=OutputFormat)
    prompt: str = ""
    use: ToolUse | None = None
    keeps_reasoning: bool = True
    budget: int | None = None

    @property
    def rules(self) -> CallRules | None:
        """What calls the output may have; None: none."""
        return None if self.use is None else self.use.rules

    def processor(self, tokenizer: Tokenizer | None, params: SamplingParams, prompt_ids: list[int]) -> OutputProcessor:
        parser = self.format.parser(self.prompt, self.use, keeps_reasoning=self.keeps_reasoning)
        return OutputProcessor(tokenizer, params, prompt_ids, parser, self.format.tags)

    def parts(self, output: TokenOutput) -> list[TokenOutput]:
        """An output as it is read: token by token, where each one may be the last of the budget."""
        return [output] if self.budget is None else token_by_token(output)

    def end_of_reasoning(self, processor: OutputProcessor, tokenizer: Tokenizer | None) -> list[int]:
        """The tokens that end the reasoning, once its budget is spent; else none."""
        parser = processor.parser
        if self.budget is None or parser is None or tokenizer is None or not parser.in_reasoning:
            return []
        if parser.num_reasoning_tokens < self.budget:
            return []
        return tokenizer.encode(self.format.reasoning_end(), add_special_tokens=False)


def certain(token_ids: list[int]) -> list[TokenLogprobs]:
    """The log-probabilities of tokens that had to come."""
    return [TokenLogprobs([id], [0.0], rank=1) for id in token_ids]


def token_by_token(output: TokenOutput) -> list[TokenOutput]:
    """The same as outputs of one token each."""
    parts = []
    for place, id in enumerate(output.token_ids):
        rows = output.logprobs[place : place + 1] if output.logprobs else None
        parts.append(replace(output, token_ids=[id], logprobs=rows, finish_reason=None, stop_token_id=None))
    if not parts:
        return [output]
    parts[-1].finish_reason, parts[-1].stop_token_id = output.finish_reason, output.stop_token_id
    return parts
