"""From a request's output tokens to its text: detokenizing, stop strings, and when and why it ended. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from powerband.core.params import SamplingParams
from powerband.core.request import OUTPUT_COMPLETE
from powerband.core.step import ErrorInfo, FinishReason, TokenLogprobs, TokenOutput
from powerband.errors import InvalidRequest
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
    must_abort: bool = False  # ended here by a stop string: the engine does not know it, and has to be told


class OutputProcessor:
    """Turns the engine's outputs for one request into deltas.

    Text that may be the beginning of a stop string, or of a character, is held back until it is clear. Meaning is
    vLLM's: the text of a stop token is left out and a stop string too (unless include_stop_str_in_output); neither ends
    an output of fewer than min_tokens; token ids are complete in any case. Without a tokenizer all text is "".
    """

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        self._detokenizer = (
            None if tokenizer is None else IncrementalDetokenizer(tokenizer, prompt_ids, params.skip_special_tokens)
        )
        self._stop = StopFinder(params.stop or [])
        self._params = params
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    def resume(self, token_ids: Sequence[int]) -> None:
        """Take output that was given out elsewhere as if it had been processed here; call it first.

        Raises InvalidRequest when a stop string ended it.
        """
        for id in token_ids:
            self._text_of(id)
            self.num_tokens += 1
            if self._stop.found:
                raise InvalidRequest(
                    f"The tokens to be resumed contain the stop string {self._stop.found!r}.",
                    param="resume_token_ids",
                    code=OUTPUT_COMPLETE,
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
                delta.text += self._text_of(id)
            self.num_tokens += 1
            if self._stop.found:
                return self._end_with_string(delta, output)
        if output.finish_reason is not None:
            self._end(delta, output)
        return delta

    def _text_of(self, id: int) -> str:
        if self._detokenizer is None:
            return ""
        is_early = self.num_tokens < self._params.min_tokens
        return self._stop.feed(self._detokenizer.append([id]), may_end=not is_early)

    def _end_with_string(self, delta: OutputDelta, output: TokenOutput) -> OutputDelta:
        if self._params.include_stop_str_in_output:
            delta.text += self._stop.found
        delta.finish_reason = self.finish_reason = FinishReason.STOP
        delta.stop_reason = self._stop.found
        delta.must_abort = output.finish_reason is None
        return delta

    def _end(self, delta: OutputDelta, output: TokenOutput) -> None:
        delta.finish_reason = self.finish_reason = output.finish_reason
        delta.error = output.error
        if output.stop_token_id is not None and output.stop_token_id not in (self._params.eos_token_ids or ()):
            delta.stop_reason = output.stop_token_id
        if self._detokenizer is not None:
            delta.text += self._stop.feed(self._detokenizer.flush(), may_end=False) + self._stop.held


class StopFinder:
    """Finds the first of several strings to be completed in a text that comes in pieces.

    text   ......... given out ......... | held: the longest end that begins a stop string
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._first = frozenset(text[0] for text in stop)
        self._longest = max(map(len, stop), default=0)
        self.held = ""
        self.found = ""

    def feed(self, piece: str, *, may_end: bool = True) -> str:
        """The text that is now certain. Once a string is complete, `found` is set and what follows it is dropped.

        may_end=False: a string that this piece completes counts as plain text.
        """
        if not self._stop or not piece:
            return piece
        text = self.held + piece
        if may_end and (first := self._first_completed(text, len(self.held))) is not None:
            end, length = first
            self.found, self.held = text[end - length : end], ""
            return text[: end - length]
        kept = self._start_of_partial(text)
        self.held = text[kept:]
        return text[:kept]

    def _first_completed(self, text: str, num_old: int) -> tuple[int, int] | None:
        """(end, length) of the string that is complete first; of two that end together, the longer."""
        ends = [
            (start + len(stop), -len(stop))
            for stop in self._stop
            if (start := text.find(stop, max(0, num_old - len(stop) + 1))) >= 0
        ]
        if not ends:
            return None
        end, negative_length = min(ends)
        return end, -negative_length

    def _start_of_partial(self, text: str) -> int:
        """Where the longest end of `text` starts that is a beginning of a stop string, but not all of it."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first:
                end = text[start:]
                if any(len(end) < len(stop) and stop.startswith(end) for stop in self._stop):
                    return start
        return len(text)
