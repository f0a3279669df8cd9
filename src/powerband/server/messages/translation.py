"""From a request for /v1/messages to the chat request that means the same."""

from __future__ import annotations

from typing import Literal

import msgspec

from powerband.errors import InvalidRequest
from powerband.openai.tools import FunctionCall, FunctionDefinition, FunctionName, NamedTool, ToolCall, ToolChoice
from powerband.server.field_places import FieldPlaces
from powerband.server.generation.reasoning import has_switch
from powerband.server.messages.requests import (
    AnyChoice,
    AutoChoice,
    CountTokensRequest,
    InputBlock,
    MessagesRequest,
    NoneChoice,
    OutputConfig,
    TextInput,
    ThinkingConfig,
    ThinkingInput,
    ToolResultInput,
    ToolUseInput,
)
from powerband.server.protocol import ChatRequest, ContentPart, JsonSchema, JsonSchemaFormat, Message, SamplingFields
from powerband.server.replica import Model

_NAMES = {
    "prompt": "messages",
    "max_completion_tokens": "max_tokens",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
    "stop": "stop_sequences",
}
_INNER = {
    "parameters": "input_schema",
    "tool_call_id": "tool_use_id",
    "arguments": "input",
}
_PHRASES = {
    "the assistant's message with their 'tool_calls'": "the message with their tool_use blocks",
    ", or send truncate_prompt_tokens": "",
}


def to_chat(body: CountTokensRequest, model: Model) -> tuple[ChatRequest, FieldPlaces]:
    """The request as a chat, and where its fields came from. Raises InvalidRequest."""
    places = FieldPlaces(_NAMES, _INNER, _PHRASES)
    config = body.output_config or OutputConfig()
    conversation = _Conversation(body, places)
    chat = ChatRequest(
        **{name: getattr(body, name) for name in SamplingFields.__struct_fields__},
        messages=conversation.messages,
        chat_template_kwargs=body.chat_template_kwargs,
        tools=places.tools(_functions(body)),
        tool_choice=_choice(body, places),
        parallel_tool_calls=_allows_parallel_calls(body),
        reasoning_effort=config.effort,
        response_format=_response_format(config),
    )
    if conversation.messages[-1].role == "assistant":  # the beginning of the answer
        chat.continue_final_message, chat.add_generation_prompt = True, False
    _set_thinking(chat, body.thinking or ThinkingConfig(type="disabled"), model)
    if isinstance(body, MessagesRequest):
        chat.max_tokens, chat.stop = body.max_tokens, body.stop_sequences
    return chat, places


def _response_format(config: OutputConfig) -> JsonSchemaFormat | None:
    asked = config.format
    return None if asked is None else JsonSchemaFormat(JsonSchema(name="output", schema=asked.schema))


def _set_thinking(chat: ChatRequest, config: ThinkingConfig, model: Model) -> None:
    """As in Anthropic's API, only a request that asks for thinking gets it."""
    if config.type == "disabled":
        chat.include_reasoning = False
        if has_switch(model):
            chat.reasoning_effort = "none"
        return
    if config.type == "enabled" and not model.format.reasoning:
        raise InvalidRequest(
            "'thinking' asks for reasoning, but none is recognized in this model's answers.",
            hint="Leave it out.",
            param="thinking",
            code="unsupported_parameter",
        )
    chat.thinking_token_budget = config.budget_tokens if model.format.reasoning else None
    chat.include_reasoning = config.display != "omitted"


class _Conversation:
    """The messages. Results of tools are messages of their own, before what else their message says.

    As in Anthropic's API, messages of one role that follow each other are one turn; some templates refuse two.
    """

    def __init__(self, body: CountTokensRequest, places: FieldPlaces) -> None:
        self.messages: list[Message] = []
        self._places = places
        if body.system:
            self._add_text("system", _joined(body.system), "system")
        for index, message in enumerate(body.messages):
            place = f"messages.{index}"
            if isinstance(message.content, str):
                self._add_text(message.role, message.content, place)
            elif message.role == "assistant":
                self._add_answer(message.content, place)
            else:
                self._add_blocks(message.role, message.content, place)

    def _add(self, message: Message, place: str) -> None:
        self._places.add(f"messages.{len(self.messages)}", place)
        self.messages.append(message)

    def _turn(self, role: Literal["user", "assistant", "system"], place: str) -> Message:
        if role == "system" or not self.messages or self.messages[-1].role != role:
            self._add(Message(role=role), place)
        return self.messages[-1]

    def _add_text(
        self, role: Literal["user", "assistant", "system"], content: str | list[ContentPart], place: str
    ) -> None:
        message = self._turn(role, place)
        message.content = _combined(message.content, content)

    def _add_blocks(self, role: Literal["user", "system"], blocks: list[InputBlock], place: str) -> None:
        """Of a user, or the system."""
        texts: list[TextInput] = []
        for index, block in enumerate(blocks):
            at = f"{place}.content.{index}"
            if isinstance(block, ToolResultInput):
                content = "" if block.content is None else _joined(block.content)
                if not content and block.is_error:
                    content = "The tool failed."
                self._add(Message(role="tool", tool_call_id=block.tool_use_id, content=content), at)
            elif isinstance(block, TextInput):
                texts.append(block)
            else:
                raise _misplaced(at, block, role)
        if texts or not blocks:
            self._add_text(role, _joined(texts), place)

    def _add_answer(self, blocks: list[InputBlock], place: str) -> None:
        answer = self._turn("assistant", place)
        position = len(self.messages) - 1
        texts: list[TextInput] = []
        thoughts: list[str] = []
        for index, block in enumerate(blocks):
            at = f"{place}.content.{index}"
            if isinstance(block, TextInput):
                texts.append(block)
            elif isinstance(block, ThinkingInput):
                thoughts.append(block.thinking)
            elif isinstance(block, ToolUseInput):
                if answer.tool_calls is None:
                    answer.tool_calls = []
                path = f"messages.{position}.tool_calls.{len(answer.tool_calls)}"
                self._places.add(path, at)
                self._places.add(f"{path}.function", at)
                arguments = msgspec.json.encode(block.input).decode()
                call = FunctionCall(name=block.name, arguments=arguments)
                answer.tool_calls.append(ToolCall(id=block.id, function=call))
            elif isinstance(block, ToolResultInput):
                raise _misplaced(at, block, "assistant")
        answer.reasoning_content = "\n".join([*filter(None, (answer.reasoning_content,)), *thoughts]) or None
        if texts or not answer.tool_calls:
            answer.content = _combined(answer.content, _joined(texts))


def _combined(first: str | list[ContentPart] | None, second: str | list[ContentPart]) -> str | list[ContentPart]:
    if not first or not second:
        return first or second
    parts = [[ContentPart("text", content)] if isinstance(content, str) else content for content in (first, second)]
    return parts[0] + parts[1]


def _joined(content: str | list[TextInput]) -> str | list[ContentPart]:
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return content[0].text
    return [ContentPart("text", block.text) for block in content] or ""


def _misplaced(place: str, block: InputBlock, role: str) -> InvalidRequest:
    kind = block.__struct_config__.tag
    return InvalidRequest(
        f"'{place}' is of type {kind}, which a message of the role '{role}' cannot have.", param=place
    )


def _functions(body: CountTokensRequest) -> list[FunctionDefinition] | None:
    if body.tools is None:
        return None
    return [
        FunctionDefinition(
            name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
        )
        for tool in body.tools
    ]


def _choice(body: CountTokensRequest, places: FieldPlaces) -> ToolChoice | None:
    choice = body.tool_choice
    if choice is None or isinstance(choice, AutoChoice):
        return None
    if isinstance(choice, AnyChoice):
        return "required"
    if isinstance(choice, NoneChoice):
        return "none"
    places.add("tool_choice.function", "tool_choice")
    return NamedTool(function=FunctionName(name=choice.name))


def _allows_parallel_calls(body: CountTokensRequest) -> bool | None:
    return False if body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use else None
