"""The format that a model was trained to write: known by its chat template, or named by a setting."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from powerband.output_parsers.families.gemma import GemmaParser
from powerband.output_parsers.families.harmony import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    MESSAGE,
    START,
    HarmonyParser,
    harmony_grammar,
)
from powerband.output_parsers.families.hermes import HermesParser, hermes_grammar
from powerband.output_parsers.families.llama3_json import TAG as PYTHON_TAG
from powerband.output_parsers.families.llama3_json import Llama3JsonParser, llama3_json_grammar
from powerband.output_parsers.families.mistral import (
    ARGUMENTS,
    CALL_ID,
    MistralParser,
    mistral_grammar,
    mistral_v11_grammar,
)
from powerband.output_parsers.families.mistral import TAG as TOOL_CALLS
from powerband.output_parsers.families.pythonic import LLAMA_TAGS, PythonicParser, gemma_grammar, pythonic_grammar
from powerband.output_parsers.families.qwen3_coder import Qwen3CoderParser, qwen3_coder_grammar
from powerband.output_parsers.families.think import ThinkParser
from powerband.output_parsers.grammar import CallRules, Grammar, ThinkTags, form_of_answer
from powerband.output_parsers.output_parser import MAX_CALLS, OutputParser
from powerband.output_parsers.text_parser import TextParser
from powerband.output_parsers.tool_use import ToolUse

THINK_TAGS = ("<think>", "</think>")
MISTRAL_THINK_TAGS = ("[THINK]", "[/THINK]")


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """tags: texts of the format that may be special tokens. short_ids: ids of calls are nine letters and digits."""

    parser: Callable[[ToolUse], TextParser]
    grammar: Callable[[Grammar, CallRules], str]
    tags: tuple[str, ...] = ()
    short_ids: bool = False


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """always: the model reasons from the first token on, unless the prompt ends the reasoning."""

    tags: tuple[str, str]
    always: bool = False


def _is_tool(use: ToolUse) -> Callable[[str], bool]:
    return use.schemas.keys().__contains__


_HARMONY_TAGS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL)
HARMONY = "openai"
TOOL_FORMATS = {
    "hermes": ToolFormat(lambda _: HermesParser(), hermes_grammar, ("<tool_call>", "</tool_call>")),
    "qwen3_coder": ToolFormat(
        lambda use: Qwen3CoderParser(use.schemas), qwen3_coder_grammar, ("<tool_call>", "</tool_call>")
    ),
    "llama3_json": ToolFormat(lambda use: Llama3JsonParser(_is_tool(use)), llama3_json_grammar, (PYTHON_TAG,)),
    "pythonic": ToolFormat(
        lambda use: PythonicParser(_is_tool(use)),
        pythonic_grammar,
        tuple(tag for pair in LLAMA_TAGS for tag in pair if tag),
    ),
    "mistral": ToolFormat(lambda _: MistralParser(), mistral_grammar, (TOOL_CALLS,), short_ids=True),
    "mistral_v11": ToolFormat(
        lambda _: MistralParser(), mistral_v11_grammar, (TOOL_CALLS, ARGUMENTS, CALL_ID), short_ids=True
    ),
    "gemma3": ToolFormat(lambda use: GemmaParser(_is_tool(use)), gemma_grammar),
    HARMONY: ToolFormat(lambda _: HarmonyParser(), harmony_grammar, _HARMONY_TAGS),
}
REASONING_FORMATS = {
    "qwen3": ReasoningFormat(THINK_TAGS),
    "deepseek_r1": ReasoningFormat(THINK_TAGS, always=True),
    "mistral": ReasoningFormat(MISTRAL_THINK_TAGS),
    "openai_gptoss": ReasoningFormat((f"{CHANNEL}analysis{MESSAGE}", END)),
}
# What a template of each format has in it; the first that is there counts.
_TOOL_MARKS = (
    ((CHANNEL, MESSAGE), HARMONY),
    ((TOOL_CALLS, ARGUMENTS), "mistral_v11"),
    ((TOOL_CALLS,), "mistral"),
    (("<arg_key>",), ""),  # GLM's, whose tags are those of Hermes
    (("<function=",), "qwen3_coder"),
    (("<tool_call>",), "hermes"),
    (("<|python_start|>",), "pythonic"),
    (("[func_name1(",), "pythonic"),
    ((PYTHON_TAG,), "llama3_json"),
    (('"parameters": ', "<|eot_id|>"), "llama3_json"),
    (("<start_of_turn>",), "gemma3"),
)
_REASONING_MARKS = (
    ((CHANNEL, MESSAGE), "openai_gptoss"),
    ((MISTRAL_THINK_TAGS[0],), "mistral"),
    ((THINK_TAGS[1],), "qwen3"),
)


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    return secrets.token_hex(5)[:9]


def _recognized(source: str, marks: tuple[tuple[tuple[str, ...], str], ...]) -> str:
    return next((name for texts, name in marks if all(text in source for text in texts)), "")


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """Of one model. Names are those of TOOL_FORMATS and REASONING_FORMATS, or ""."""

    tools: str = ""
    reasoning: str = ""

    @classmethod
    def of(cls, template: str, tools: str = "auto", reasoning: str = "auto") -> OutputFormat:
        """template: the source of the chat template. tools, reasoning: the settings."""
        named = {"none": ""}
        return cls(
            _recognized(template, _TOOL_MARKS) if tools == "auto" else named.get(tools, tools),
            _recognized(template, _REASONING_MARKS) if reasoning == "auto" else named.get(reasoning, reasoning),
        )

    @property
    def writes_tools_in_text(self) -> bool:
        """Whether tools are text of a message where the template does not write them."""
        return self.tools == "gemma3"

    @property
    def tags(self) -> set[str]:
        """Texts that the parsers look for, of which some are special tokens."""
        tags: set[str] = set()
        if self.tools:
            tags |= set(TOOL_FORMATS[self.tools].tags)
        if self.reasoning == "openai_gptoss":
            tags |= set(_HARMONY_TAGS)
        elif self.reasoning:
            tags |= set(REASONING_FORMATS[self.reasoning].tags)
        return tags

    def starts_in_reasoning(self, prompt: str) -> bool:
        """Whether the reasoning is open at the end of the prompt."""
        if not self.reasoning or self.reasoning == "openai_gptoss":
            return False
        reasoning, end = REASONING_FORMATS[self.reasoning], prompt.rstrip()
        opening, closing = reasoning.tags
        return end.endswith(opening) or (reasoning.always and not end.endswith(closing))

    def continued(self, message: str) -> str:
        """What stands for the prompt where the output goes on with an assistant's message."""
        if not self.reasoning or self.reasoning == "openai_gptoss":
            return ""
        opening, closing = REASONING_FORMATS[self.reasoning].tags
        return opening if message.rfind(opening) > message.rfind(closing) else closing

    def parser(self, prompt: str, use: ToolUse | None, *, keeps_reasoning: bool = True) -> OutputParser | None:
        """For one output; None where all of it is text. prompt: its end, as text."""
        calls = use is not None and use.rules is not None and bool(self.tools)
        max_calls = 1 if use is not None and use.rules is not None and not use.rules.parallel else MAX_CALLS
        if self.reasoning == "openai_gptoss" or (calls and self.tools == HARMONY):
            in_header = prompt.rstrip().endswith((f"{START}assistant", END))
            harmony = HarmonyParser(gives_calls=calls, starts_in_header=in_header)
            return self._output_parser(None, harmony, max_calls, keeps_reasoning)
        reasoning = None
        if self.reasoning:
            tags = REASONING_FORMATS[self.reasoning].tags
            reasoning = ThinkParser(*tags, starts_open=self.starts_in_reasoning(prompt))
        if reasoning is None and not calls:
            return None
        tools = TOOL_FORMATS[self.tools].parser(use) if use is not None and calls else None
        return self._output_parser(reasoning, tools, max_calls, keeps_reasoning)

    def _output_parser(
        self, reasoning: TextParser | None, tools: TextParser | None, max_calls: int, keeps_reasoning: bool
    ) -> OutputParser:
        make_id = _short_id if self.tools and TOOL_FORMATS[self.tools].short_ids else _call_id
        return OutputParser(reasoning, tools, max_calls=max_calls, keeps_reasoning=keeps_reasoning, make_id=make_id)

    def grammar(
        self, prompt: str, rules: CallRules | None, token_id: Callable[[str], int | None], answer: str = ""
    ) -> str:
        """What keeps calls in their form, and an answer that is no call in its own, as llguidance takes it.

        answer: a grammar; "": any text. Raises ValueError for one that cannot be part of another.
        """
        tags = thinking = None
        if self.reasoning and self.reasoning != "openai_gptoss":
            tags = REASONING_FORMATS[self.reasoning].tags
        if tags and not prompt.rstrip().endswith(tags[1]):  # else there is none any more
            thinking = ThinkTags(*tags, starts_open=self.starts_in_reasoning(prompt))
        grammar = Grammar(token_id, thinking, form_of_answer(answer) if answer else "")
        if rules is not None:
            return TOOL_FORMATS[self.tools].grammar(grammar, rules)
        if self.reasoning == "openai_gptoss":
            return harmony_grammar(grammar, CallRules(()))
        return grammar.write(f"{grammar.reasoning} WS? {grammar.answer or 'TEXT'}")

    def reasoning_end(self) -> str:
        """The text that ends the reasoning, for a model that is to stop it."""
        if self.reasoning == "openai_gptoss":
            return f"{END}{START}assistant{CHANNEL}final{MESSAGE}"
        return f"\n{REASONING_FORMATS[self.reasoning].tags[1]}\n\n"
