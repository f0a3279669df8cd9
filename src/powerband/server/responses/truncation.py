"""`truncation: "auto"`: a conversation that is longer than the context loses its oldest turns."""

from __future__ import annotations

from powerband.errors import RequestTooLong
from powerband.server.generation.chats import count_tokens
from powerband.server.protocol import ChatRequest, Message
from powerband.server.replica import Model, ServerState


async def leave_out_oldest(replica: ServerState, model: Model, chat: ChatRequest) -> None:
    """Leave out as few turns as it takes, in place: never the instructions at the beginning, nor the last turn.

    A turn is what a user says with all that follows it, so that no call is without its results. Renders the prompt
    about log2(turns) times. Raises InvalidRequest for what is wrong at any length.
    """
    messages = chat.messages
    head = next((index for index, one in enumerate(messages) if one.role not in ("system", "developer")), len(messages))
    starts = [index for index in range(head + 1, len(messages)) if messages[index].role == "user"]
    if not starts or await _fits(replica, model, chat):
        return
    low, high = 0, len(starts) - 1  # places in `starts` of the first turn that is kept
    while low < high:
        middle = (low + high) // 2
        if await _fits(replica, model, _kept(chat, messages[:head] + messages[starts[middle] :])):
            high = middle
        else:
            low = middle + 1
    _kept(chat, messages[:head] + messages[starts[low] :])


def _kept(chat: ChatRequest, messages: list[Message]) -> ChatRequest:
    chat.messages = messages
    return chat


async def _fits(replica: ServerState, model: Model, chat: ChatRequest) -> bool:
    try:
        await count_tokens(replica, model, chat)
    except RequestTooLong:
        return False
    return True
