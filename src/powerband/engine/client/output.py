"""From a request's output tokens to its text: detokenizing, stop strings, and when and why it ended. No torch here."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from powerband.core.params import SamplingParams
from powerband.core.request import OUTPUT_COMPLETE
from powerband.core.step import ErrorInfo, FinishReason, TokenLogprobs, TokenOutput
from powerband.errors import InvalidRequest
from powerband.output_parsers.events import Event
from powerband.output_parsers.output_parser import OutputParser
from powerband.text.detokenizer import IncrementalDetokenizer
from powerband.text.tokenizer import Tokenizer


@dataclass(slots=True)
class OutputDelta:
    """What one engine output added. Texts, tokens and logprobs of all deltas in order are the whole answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # one per token, if asked for
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string that ended it; None for EOS and other ends
    error: ErrorInfo | None = None
    events: list[Event] = field(default_factory=list)  # what a parser found in the text
    must_abort: bool = False  # ended here by a stop string: the engine does not know and must be sent an abort


class OutputProcessor:
    """Turns the engine's outputs for one request into deltas.

    Text that may be the beginning of a stop string, or of a character, is held back until it is clear. Meaning is
    vLLM's: the text of a stop token is left out and a stop string too (unless include_stop_str_in_output); neither ends
    an output of fewer than min_tokens; token ids are complete in any case. Without a tokenizer all text is "".
    Unlike in vLLM, a stop string with a special token in it is found where special tokens are skipped, too.

    parser: reads the text, too, and finds reasoning and tool calls. A stop string inside a call does not end the
    output, or the call would not be whole; the parser ends it when there are to be no more calls. tags: texts that it
    looks for; special tokens among them are part of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt_ids: Sequence[int] = (),
        parser: OutputParser | None = None,
        tags: Iterable[str] = (),
    ) -> None:
        self.parser = parser
        self._detokenizer = None
        if tokenizer is not None:
            kept = {id for tag in tags if parser and (id := tokenizer.token_id(tag)) is not None}
            self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids, params.skip_special_tokens, kept)
        stop = params.stop or []
        skips = params.skip_special_tokens and tokenizer is not None
        special = [text for text in stop if skips and tokenizer is not None and _names_special(tokenizer, text)]
        self._stop = StopFinder([text for text in stop if text not in special])
        self._special_stop = SpecialStopFinder(tokenizer, special, prompt_ids) if tokenizer and special else None
        self._params = params
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    def resume(self, token_ids: Sequence[int]) -> None:
        """Process output that another replica has already sent; call it first.

        Raises InvalidRequest when a stop string ended it.
        """
        for id in token_ids:
            text = self._text_of(id)
            if self.parser is not None:
                self.parser.feed_token(text)
            self.num_tokens += 1
            if self._found or self._is_complete:
                what = f"contain the stop string {self._found!r}" if self._found else "have all the calls there may be"
                raise InvalidRequest(
                    f"The tokens to be resumed {what}.", param="resume_token_ids", code=OUTPUT_COMPLETE
                )

    def process(self, output: TokenOutput) -> OutputDelta:
        """The delta of this output; an empty one for outputs that were under way when the request had ended."""
        delta = OutputDelta()
        if self.finish_reason is not None:
            return delta
        for i, id in enumerate(output.token_ids):
            delta.token_ids.append(id)
            if output.logprobs:
                delta.logprobs.append(output.logprobs[i])
            ends_here = id == output.stop_token_id and i == len(output.token_ids) - 1
            if not (ends_here and not self._params.include_stop_str_in_output):
                text = self._text_of(id)
                delta.text += text
                if self.parser is not None:
                    delta.events += self.parser.feed_token(text)
            self.num_tokens += 1
            if self._found or self._is_complete:
                return self._end_here(delta, output)
        if output.finish_reason is not None:
            self._end(delta, output)
        return delta

    def _text_of(self, id: int) -> str:
        if self._detokenizer is None:
            return ""
        may_end = self.num_tokens >= self._params.min_tokens and not (self.parser and self.parser.in_call)
        piece, held = self._detokenizer.append([id]), self._stop.held
        text = self._stop.feed(piece, may_end=may_end)
        if self._special_stop is None:
            return text
        return self._special_stop.feed(id, piece, held, text, self._stop, may_end=may_end)

    @property
    def _found(self) -> str:
        """The stop string that ended the output."""
        return (self._special_stop.found if self._special_stop else "") or self._stop.found

    @property
    def _is_complete(self) -> bool:
        return self.parser is not None and self.parser.is_complete

    def _end_here(self, delta: OutputDelta, output: TokenOutput) -> OutputDelta:
        """With a stop string, or with the last call, before the engine ends it."""
        rest = self._found if self._params.include_stop_str_in_output else ""
        delta.text += rest
        delta.finish_reason = self.finish_reason = FinishReason.STOP
        self._finish_parser(delta, rest)
        delta.stop_reason = self._found or None
        delta.must_abort = output.finish_reason is None
        return delta

    def _end(self, delta: OutputDelta, output: TokenOutput) -> None:
        delta.finish_reason = self.finish_reason = output.finish_reason
        delta.error = output.error
        if output.stop_token_id is not None and output.stop_token_id not in (self._params.eos_token_ids or ()):
            delta.stop_reason = output.stop_token_id
        rest = ""
        if self._detokenizer is not None:
            rest += self._special_stop.waiting if self._special_stop else ""
            rest += self._stop.feed(self._detokenizer.flush(), may_end=False) + self._stop.held
        delta.text += rest
        self._finish_parser(delta, rest)

    def _finish_parser(self, delta: OutputDelta, rest: str) -> None:
        if self.parser is not None:
            delta.events += self.parser.feed(rest)
            delta.events += self.parser.finish(complete=self.finish_reason is FinishReason.STOP)


class StopStrings:
    """An Aho-Corasick automaton over stop strings (Aho, Corasick 1975): one pass over a text finds all of them.

    Its states are the beginnings of the strings, 0 the empty one, in flat arrays of some 30 bytes for each character.
    """

    __slots__ = ("_chars", "_children", "_falls", "_siblings", "ends", "first", "held")

    def __init__(self, stop: Sequence[str]) -> None:
        self.first = frozenset(text[0] for text in stop)
        self._chars = [""]  # by which a state is entered
        self._children = array("i", [0])  # the first state that follows, 0: none
        self._siblings = array("i", [0])  # another that follows the same state
        self.ends = array("i", [0])  # by state: length of the longest string that ends there, 0: none
        depths = array("i", [0])
        for text in stop:
            state = 0
            for char in text:
                state = self._child(state, char) or self._add(state, char, depths)
            self.ends[state] = len(text)
        self._falls = array("i", bytes(4 * len(self._chars)))  # the longest end that is a state, too
        self.held = array("i", bytes(4 * len(self._chars)))  # length of the longest end that begins another string
        self._link(depths)

    def step(self, state: int, char: str) -> int:
        """The longest end of the text so far that begins a string. Falls cost no more than steps did before."""
        while not (found := self._child(state, char)) and state:
            state = self._falls[state]
        return found

    def _child(self, state: int, char: str) -> int:
        child = self._children[state]
        while child and self._chars[child] != char:
            child = self._siblings[child]
        return child

    def _add(self, parent: int, char: str, depths: array[int]) -> int:
        state = len(self._chars)
        self._chars.append(char)
        self._children.append(0)
        self._siblings.append(self._children[parent])
        self._children[parent] = state
        self.ends.append(0)
        depths.append(depths[parent] + 1)
        return state

    def _link(self, depths: array[int]) -> None:
        """Fill `_falls` and `held` and complete `ends`, from short beginnings to long ones."""
        waiting = deque([0])
        while waiting:
            state = waiting.popleft()
            child = self._children[state]
            while child:
                fall = self.step(self._falls[state], self._chars[child]) if state else 0
                self._falls[child] = fall
                self.ends[child] = self.ends[child] or self.ends[fall]
                self.held[child] = depths[child] if self._children[child] else self.held[fall]
                waiting.append(child)
                child = self._siblings[child]


@lru_cache(maxsize=16)
def _compiled(stop: tuple[str, ...]) -> StopStrings:
    """The answers to one request are begun one after the other and share it. At most some 100 kB each are kept."""
    return StopStrings(stop)


class StopFinder:
    """Finds the first of several strings to be completed in a text that comes in pieces.

    text   ......... given out ......... | held: the longest end that begins a stop string
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._strings = _compiled(tuple(stop))
        self._state = 0
        self.held = ""
        self.found = ""

    def feed(self, piece: str, *, may_end: bool = True) -> str:
        """The text that is now certain. Once a string is complete, `found` is set and what follows it is dropped.

        may_end=False: a string that this piece completes counts as plain text. Of two that end together, the longer
        counts.
        """
        strings, state = self._strings, self._state
        if not state and strings.first.isdisjoint(piece):
            return piece
        for index, char in enumerate(piece):
            state = strings.step(state, char)
            if may_end and (length := strings.ends[state]):
                text = self.held + piece[: index + 1]
                self.found, self.held, self._state = text[-length:], "", 0
                return text[:-length]
        self._state = state
        text = self.held + piece
        kept = len(text) - strings.held[state]
        self.held = text[kept:]
        return text[:kept]


class SpecialStopFinder:
    """Finds stop strings with special tokens in them, where the text that is given out leaves special tokens out.

    It reads the text with special tokens, and of the other text holds back what may belong to a stop string:

    with them      ......... B<|im_end|>  |  held here: the beginning of "B<|im_end|>\\n"
    without them   ......... B            |  so "B" waits
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], prompt_ids: Sequence[int]) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids, skip_special_tokens=False)
        self._finder = StopFinder(stop)
        self._marks = ""  # per character that the finder holds: "1" where the text given out has it, too
        self.waiting = ""  # certain but for the strings here
        self.found = ""

    def feed(self, id: int, piece: str, held: str, text: str, other: StopFinder, *, may_end: bool) -> str:
        """The text that is now certain, after a token.

        piece: what the token adds to the text without special tokens; of this, `other` held `held` before the token,
        and now gives out `text`. Where both find a string, the one counts that leaves less text.
        """
        whole = self._detokenizer.append([id])
        num_given_out = min(len(piece), len(whole))
        marks = self._marks + "0" * (len(whole) - num_given_out) + "1" * num_given_out
        start = len(self._finder.feed(whole, may_end=may_end))
        num_held = marks.count("1", start)
        if self._finder.found:
            before = _without_end(self.waiting + held + piece, num_held)
            if not other.found or len(before) <= len(self.waiting + text):
                self.found = self._finder.found
                return before
        certain = self.waiting + text
        if other.found:
            return certain
        self._marks = marks[start:]
        given = _without_end(certain, num_held - len(other.held))
        self.waiting = certain[len(given) :]
        return given


def _without_end(text: str, length: int) -> str:
    return text[: max(0, len(text) - length)] if length > 0 else text


@lru_cache(maxsize=1024)
def _names_special(tokenizer: Tokenizer, text: str) -> bool:
    return any(token in text for token in map(tokenizer.token, tokenizer.special_ids) if token)
