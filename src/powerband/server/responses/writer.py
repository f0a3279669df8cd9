"""Output items and events from the pieces of an answer. A whole response is what the last event of a stream holds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

import msgspec

from powerband.openai.events import named_event
from powerband.server.replies import TokenLogprob
from powerband.server.responses.objects import (
    DeltaLogprob,
    FunctionCallOutput,
    IncompleteDetails,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningOutput,
    ReasoningText,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponseUsage,
    SummaryText,
)

_DELTA_LOGPROB = msgspec.json.Decoder(DeltaLogprob)


class ResponseWriter:
    """Writes one response. At most one item is open at a time: what belongs to another one closes it.

    `take` gives the events since it was last called, as bytes to send.
    """

    def __init__(self, response: ResponseObject, *, writes_events: bool) -> None:
        self.response = response
        self._writes_events = writes_events
        self._id = response.id.removeprefix("resp_")
        self._summarizes = response.reasoning.summary is not None
        self._num_events = 0
        self._events: list[bytes] = []
        self._texts: list[str] = []  # of the open item
        self._logprobs: list[TokenLogprob] = []
        self._delta_logprobs: list[DeltaLogprob] = []
        self._open: OutputItem | None = None

    @property
    def writes_text(self) -> bool:
        """Whether a message is open."""
        return isinstance(self._open, OutputMessage)

    def take(self) -> bytes:
        data = b"".join(self._events)
        self._events.clear()
        return data

    def begin(self) -> None:
        self._emit(ResponseEvent(type="response.created", response=self.response))
        self._emit(ResponseEvent(type="response.in_progress", response=self.response))

    def add_reasoning(self, text: str) -> None:
        if not isinstance(self._open, ReasoningOutput):
            self._add_item(ReasoningOutput(id=self._item_id("rs")))
            if self._summarizes:
                self._emit_of_item(
                    ResponseEvent(type="response.reasoning_summary_part.added", summary_index=0, part=SummaryText())
                )
            else:
                self._emit_of_item(
                    ResponseEvent(type="response.content_part.added", content_index=0, part=ReasoningText())
                )
        self._texts.append(text)
        if self._summarizes:
            self._emit_of_item(ResponseEvent(type="response.reasoning_summary_text.delta", summary_index=0, delta=text))
        else:
            self._emit_of_item(ResponseEvent(type="response.reasoning_text.delta", content_index=0, delta=text))

    def add_text(self, text: str, logprobs: Sequence[TokenLogprob] = ()) -> None:
        if not isinstance(self._open, OutputMessage):
            self._begin_message()
        self._texts.append(text)
        self._logprobs += logprobs
        short = _without_bytes(logprobs) if self._writes_events else []
        self._delta_logprobs += short
        self._emit_of_item(
            ResponseEvent(type="response.output_text.delta", content_index=0, delta=text, logprobs=short)
        )

    def begin_call(self, call_id: str, name: str) -> None:
        self._add_item(FunctionCallOutput(id=self._item_id("fc"), call_id=call_id, name=name))

    def add_arguments(self, text: str) -> None:
        """To the call that was begun last."""
        self._texts.append(text)
        self._emit_of_item(ResponseEvent(type="response.function_call_arguments.delta", delta=text))

    def end(self, usage: ResponseUsage, *, is_complete: bool) -> None:
        response = self.response
        if not response.output:
            self._begin_message()
        self._close_item("completed" if is_complete else "incomplete")
        response.usage = usage
        if is_complete:
            response.status, response.completed_at = "completed", int(time.time())
        else:
            response.status, response.incomplete_details = "incomplete", IncompleteDetails("max_output_tokens")
        self._emit(ResponseEvent(type=f"response.{response.status}", response=response))

    def fail(self, error: ResponseError) -> None:
        """End with an error."""
        self._close_item("incomplete")
        self.response.status, self.response.error = "failed", error
        self._emit(ResponseEvent(type="response.failed", response=self.response))

    def _begin_message(self) -> None:
        self._add_item(OutputMessage(id=self._item_id("msg")))
        self._emit_of_item(ResponseEvent(type="response.content_part.added", content_index=0, part=OutputText()))

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_{self._id}_{len(self.response.output)}"

    def _add_item(self, item: OutputItem) -> None:
        self._close_item("completed")
        self._open = item
        self.response.output.append(item)
        self._emit(
            ResponseEvent(type="response.output_item.added", output_index=len(self.response.output) - 1, item=item)
        )

    def _close_item(self, status: ItemStatus) -> None:
        item = self._open
        if item is None:
            return
        text, logprobs = "".join(self._texts), self._logprobs
        item.status = status
        if isinstance(item, OutputMessage):
            part = OutputText(text=text, logprobs=logprobs)
            item.content = [part]
            self._emit_of_item(
                ResponseEvent(
                    type="response.output_text.done", content_index=0, text=text, logprobs=self._delta_logprobs
                )
            )
            self._emit_of_item(ResponseEvent(type="response.content_part.done", content_index=0, part=part))
        elif isinstance(item, FunctionCallOutput):
            item.arguments = text
            self._emit_of_item(ResponseEvent(type="response.function_call_arguments.done", arguments=text))
        elif self._summarizes:
            item.summary = [SummaryText(text=text)]
            self._emit_of_item(ResponseEvent(type="response.reasoning_summary_text.done", summary_index=0, text=text))
            self._emit_of_item(
                ResponseEvent(type="response.reasoning_summary_part.done", summary_index=0, part=item.summary[0])
            )
        else:
            item.content = [ReasoningText(text=text)]
            self._emit_of_item(ResponseEvent(type="response.reasoning_text.done", content_index=0, text=text))
            self._emit_of_item(ResponseEvent(type="response.content_part.done", content_index=0, part=item.content[0]))
        self._emit(
            ResponseEvent(type="response.output_item.done", output_index=len(self.response.output) - 1, item=item)
        )
        self._texts, self._logprobs, self._delta_logprobs, self._open = [], [], [], None

    def _emit_of_item(self, event: ResponseEvent) -> None:
        """Of the open item."""
        if self._open is not None:
            event.item_id, event.output_index = self._open.id, len(self.response.output) - 1
            self._emit(event)

    def _emit(self, event: ResponseEvent) -> None:
        if self._writes_events:
            event.sequence_number = self._num_events
            self._num_events += 1
            self._events.append(named_event(event.type, msgspec.json.encode(event)))


def _without_bytes(logprobs: Sequence[TokenLogprob]) -> list[DeltaLogprob]:
    """In the form that deltas have; as JSON, as LogprobWriter gives them."""
    short = (_DELTA_LOGPROB.decode(msgspec.json.encode(one)) for one in logprobs)
    return [cast(DeltaLogprob, msgspec.Raw(msgspec.json.encode(one))) for one in short]
