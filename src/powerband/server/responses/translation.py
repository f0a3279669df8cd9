"""From a request for /v1/responses to the chat request that means the same."""

from __future__ import annotations

from typing import Any

from powerband.errors import InvalidRequest
from powerband.openai.tools import (
    AllowedTool,
    AllowedTools,
    AllowedToolsMode,
    FunctionCall,
    FunctionDefinition,
    FunctionName,
    NamedTool,
    ToolCall,
    ToolChoice,
)
from powerband.server.field_places import FieldPlaces
from powerband.server.protocol import (
    ChatRequest,
    ContentPart,
    JsonSchema,
    JsonSchemaFormat,
    Message,
    OpenAIRequest,
    ResponseFormat,
)
from powerband.server.responses.requests import (
    FunctionCallItem,
    FunctionResultItem,
    JsonSchemaText,
    MessageItem,
    NamedFunction,
    ReasoningItem,
    RefusalInput,
    ResponsesRequest,
)

LOGPROBS = "message.output_text.logprobs"
_NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_INNER = {"tool_call_id": "call_id"}
_PHRASES = {
    "the assistant's message with their 'tool_calls'": "their function_call items",
    "truncate_prompt_tokens": 'truncation "auto"',
}
_SAME_NAME = OpenAIRequest.__struct_fields__


def to_chat(body: ResponsesRequest) -> tuple[ChatRequest, FieldPlaces]:
    """The request as a chat, and where its fields came from. Raises InvalidRequest."""
    places = FieldPlaces(_NAMES, _INNER, _PHRASES)
    logprobs = LOGPROBS in (body.include or ())
    if body.top_logprobs and not logprobs:
        raise InvalidRequest(f"top_logprobs needs '{LOGPROBS}' in 'include'.", param="top_logprobs")
    chat = ChatRequest(
        **{name: getattr(body, name) for name in _SAME_NAME},
        messages=_Conversation(body, places).messages,
        max_completion_tokens=body.max_output_tokens,
        logprobs=logprobs or None,
        top_logprobs=body.top_logprobs if logprobs else None,
        chat_template_kwargs=body.chat_template_kwargs,
        tools=places.tools(_functions(body)),
        tool_choice=_choice(body, places),
        parallel_tool_calls=body.parallel_tool_calls,
        thinking_token_budget=body.thinking_token_budget,
        response_format=_response_format(body),
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
    )
    return chat, places


def _response_format(body: ResponsesRequest) -> ResponseFormat | None:
    asked = body.text.format if body.text else None
    if isinstance(asked, JsonSchemaText):
        return JsonSchemaFormat(
            JsonSchema(name=asked.name, schema=asked.schema, strict=asked.strict, description=asked.description)
        )
    return asked


class _Conversation:
    """The messages of an input. Reasoning, an answer and calls that follow each other are one message."""

    def __init__(self, body: ResponsesRequest, places: FieldPlaces) -> None:
        self.messages: list[Message] = []
        self._places = places
        if body.instructions:
            self._add(Message(role="system", content=body.instructions), "instructions")
        if isinstance(body.input, str):
            self._add(Message(role="user", content=body.input), "input")
            return
        for index, item in enumerate(body.input):
            place = f"input.{index}"
            if isinstance(item, MessageItem):
                self._add_message(item, place)
            elif isinstance(item, FunctionCallItem):
                self._add_call(item, place)
            elif isinstance(item, FunctionResultItem):
                self._add(Message(role="tool", tool_call_id=item.call_id, content=_content(item.output)), place)
                self._places.add(f"messages.{len(self.messages) - 1}.content", f"{place}.output")
            else:
                self._add_reasoning(item, place)

    def _add(self, message: Message, place: str) -> None:
        self._places.add(f"messages.{len(self.messages)}", place)
        self.messages.append(message)

    def _answer(self, place: str) -> Message:
        """The message of the assistant that goes on."""
        if not self.messages or self.messages[-1].role != "assistant":
            self._add(Message(role="assistant"), place)
        return self.messages[-1]

    def _add_message(self, item: MessageItem, place: str) -> None:
        content = _content(item.content)
        last = self.messages[-1] if self.messages else None
        follows_reasoning = last is not None and last.role == "assistant" and last.content is None
        if item.role == "assistant" and last is not None and follows_reasoning and not last.tool_calls:
            last.content = content
            self._places.add(f"messages.{len(self.messages) - 1}.content", f"{place}.content")
        else:
            self._add(Message(role=item.role, content=content), place)

    def _add_reasoning(self, item: ReasoningItem, place: str) -> None:
        text = "\n".join(part.text for part in item.content or item.summary or ())
        if text:
            self._add(Message(role="assistant", reasoning_content=text), place)

    def _add_call(self, item: FunctionCallItem, place: str) -> None:
        answer = self._answer(place)
        if answer.tool_calls is None:
            answer.tool_calls = []
        call = FunctionCall(name=item.name, arguments=item.arguments)
        answer.tool_calls.append(ToolCall(id=item.call_id, function=call))
        path = f"messages.{len(self.messages) - 1}.tool_calls.{len(answer.tool_calls) - 1}"
        self._places.add(path, place)
        self._places.add(f"{path}.id", f"{place}.call_id")
        self._places.add(f"{path}.function", place)


def _content(content: Any) -> str | list[ContentPart]:
    if isinstance(content, str):
        return content
    texts = [part.refusal if isinstance(part, RefusalInput) else part.text for part in content]
    if len(texts) == 1:
        return str(texts[0])
    return [ContentPart("text", text) for text in texts] or ""


def _functions(body: ResponsesRequest) -> list[FunctionDefinition] | None:
    if body.tools is None:
        return None
    return [
        FunctionDefinition(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
        for tool in body.tools
    ]


def _choice(body: ResponsesRequest, places: FieldPlaces) -> ToolChoice | None:
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return choice
    if isinstance(choice, NamedFunction):
        places.add("tool_choice.function", "tool_choice")
        return NamedTool(function=FunctionName(name=choice.name))
    places.add("tool_choice.allowed_tools", "tool_choice")
    for index in range(len(choice.tools)):
        places.add(f"tool_choice.allowed_tools.tools.{index}.function", f"tool_choice.tools.{index}")
    allowed = [AllowedTool(function=FunctionName(name=tool.name)) for tool in choice.tools]
    return AllowedTools(allowed_tools=AllowedToolsMode(mode=choice.mode, tools=allowed))
