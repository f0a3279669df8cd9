"""The parser of one output: reasoning first, then text and tool calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from powerband.output_parsers.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from powerband.output_parsers.text_parser import TextParser, past_space

MAX_CALLS = 128  # of one message
MAX_EQUAL_CALLS = 16  # one after the other


class OutputParser:
    """Feeds text through the parsers of a family and puts the result in order.

    Blanks around calls and after the reasoning are not content. Of calls beyond `max_calls` nothing is given out.
    `is_complete` says that there is to be no more of the output: it has all the calls that it may have, or a model that
    has lost its way makes one call over and over.
    keeps_reasoning: False leaves the reasoning out. make_id: for calls without an id.
    """

    def __init__(
        self,
        reasoning: TextParser | None = None,
        tools: TextParser | None = None,
        *,
        max_calls: int = MAX_CALLS,
        keeps_reasoning: bool = True,
        make_id: Callable[[], str] = str,
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._max_calls = max_calls
        self._keeps_reasoning = keeps_reasoning
        self._make_id = make_id
        self._blanks = ""  # that may turn out to be content
        self._drops_blanks = False
        self._has_content = False
        self.num_calls = 0
        self.is_complete = False
        self._call: list[str] = []  # the last one's name and arguments
        self._call_before: list[str] = []
        self._num_equal = 1  # calls, one after the other
        self.num_reasoning_tokens = 0
        self._num_doubtful = 0  # that may belong to the tag

    @property
    def in_call(self) -> bool:
        return self._tools is not None and self._tools.in_call

    @property
    def in_reasoning(self) -> bool:
        return any(parser is not None and parser.in_reasoning for parser in (self._reasoning, self._tools))

    def feed_token(self, text: str) -> list[Event]:
        """The events that one token's text completes. Tokens of the reasoning are counted, those of its tags not."""
        before = self.in_reasoning
        events = self.feed(text)
        if not self.in_reasoning:
            self._num_doubtful = 0
        elif before:
            self._num_doubtful += 1
            if not any(parser is not None and parser.is_waiting for parser in (self._reasoning, self._tools)):
                self.num_reasoning_tokens += self._num_doubtful
                self._num_doubtful = 0
        return events

    def feed(self, text: str) -> list[Event]:
        if self._reasoning is None:
            return list(self._in_order(self._tools.feed(text) if self._tools else [Content(text)]))
        return list(self._in_order(self._through_tools(self._reasoning.feed(text))))

    def finish(self, *, complete: bool) -> list[Event]:
        """complete: the model ended here; otherwise the output was cut."""
        events: list[Event] = []
        if self._reasoning is not None:
            events += self._through_tools(self._reasoning.finish(complete=complete))
        if self._tools is not None:
            events += self._tools.finish(complete=complete)
        given = list(self._in_order(events))
        if complete and self._blanks and not (self.num_calls or self._drops_blanks):
            given.append(Content(self._blanks))
        self._blanks = ""
        return given

    def _through_tools(self, events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            if isinstance(event, Content) and self._tools is not None:
                yield from self._tools.feed(event.text)
            else:
                yield event

    def _in_order(self, events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            match event:
                case Content(text):
                    yield from self._content(text)
                case Reasoning():
                    self._drops_blanks = True
                    if self._keeps_reasoning:
                        yield event
                case CallStart() | CallArguments() | CallEnd():
                    self._drops_blanks, self._has_content, self._blanks = True, False, ""
                    if event.index < self._max_calls:
                        self._follow_call(event)
                        yield event

    def _follow_call(self, event: CallStart | CallArguments | CallEnd) -> None:
        if isinstance(event, CallStart):
            self.num_calls += 1
            event.id = event.id or self._make_id()
            self._call = [event.name, ""]
        elif isinstance(event, CallArguments):
            self._call.append(event.text)
        else:
            name, *arguments = self._call
            call = [name, "".join(arguments)]
            self._num_equal = self._num_equal + 1 if call == self._call_before else 1
            self._call_before = call
            self.is_complete = self.num_calls >= self._max_calls or self._num_equal >= MAX_EQUAL_CALLS

    def _content(self, text: str) -> Iterator[Content]:
        if not self._has_content:
            end = past_space(text, 0)
            if not self._drops_blanks:
                self._blanks += text[:end]
            if end == len(text):
                return
            text, self._blanks = self._blanks + text[end:], ""
            self._has_content = True
        if text:
            yield Content(text)
