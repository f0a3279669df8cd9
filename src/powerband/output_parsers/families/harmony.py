"""Harmony (gpt-oss): messages with a channel each, of which one may call a tool.

<|channel|>analysis<|message|>…<|end|><|start|>assistant
<|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|> or <|channel|>final<|message|>…<|return|>

The prompt ends with <|start|>assistant.
"""

from __future__ import annotations

from collections.abc import Callable

from powerband.output_parsers.grammar import CallRules, Grammar, any_of, json_value, quoted
from powerband.output_parsers.text_parser import MAX_NAME_CHARS, TextParser

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
_ENDS = (END, CALL, RETURN, START, CHANNEL)
_FUNCTIONS = "functions."


class HarmonyParser(TextParser):
    """analysis is reasoning, and so are calls of tools that are not the request's (to=browser…); commentary without a
    recipient and final are text. Without `gives_calls` a call is reasoning, too. starts_in_header: the prompt ended
    with <|start|>assistant, as it does unless it continues a message.
    """

    def __init__(self, *, gives_calls: bool = True, starts_in_header: bool = True) -> None:
        super().__init__()
        self._gives_calls = gives_calls
        self._has_arguments = False
        self._state = self._start if starts_in_header else self._text_body

    @property
    def in_call(self) -> bool:
        """Or in a header, which may be a call's."""
        return super().in_call or (self._state == self._start and self.is_waiting)

    @property
    def in_reasoning(self) -> bool:
        return self._state == self._reasoning_body

    def _start(self) -> bool:
        """The header, up to <|message|>. Text that is no header, from a model that writes none, is content."""
        end = self._text.find(MESSAGE, self._at)
        if end < 0:
            if self._may_be_header(self._text[self._at :]) and len(self._text) - self._at < 2 * MAX_NAME_CHARS:
                return False
            self._expect((CHANNEL, START))  # of a header that does not end: a tag is no text
            self._state = self._text_body
            return True
        header = self._text[self._at : end]
        if not self._may_be_header(header):
            self._state = self._text_body
            return True
        self._at = end + len(MESSAGE)
        self._open(header)
        return True

    def _may_be_header(self, text: str) -> bool:
        bare = text.lstrip()
        return not bare or any(tag.startswith(bare) or bare.startswith(tag) for tag in (CHANNEL, START, "to=", MESSAGE))

    def _open(self, header: str) -> None:
        before, _, rest = header.partition(CHANNEL)
        recipient = _recipient(rest) or _recipient(before)
        words = rest.split()
        channel = words[0].partition("<")[0] if words else ""
        if recipient.startswith(_FUNCTIONS) and self._gives_calls and len(recipient) > len(_FUNCTIONS):
            self._call_start(recipient.removeprefix(_FUNCTIONS))
            self._has_arguments = False
            self._state = self._call_body
        elif recipient or channel == "analysis":
            self._state = self._reasoning_body
        else:
            self._state = self._text_body

    def _text_body(self) -> bool:
        return self._body(self._content)

    def _reasoning_body(self) -> bool:
        return self._body(self._reasoning)

    def _call_body(self) -> bool:
        return self._body(self._give_arguments)

    def _body(self, emit: Callable[[str], None]) -> bool:
        tag = self._until(_ENDS, emit)
        if not tag:
            return False
        if tag in (START, CHANNEL):  # a header follows without an end before it
            self._at -= len(tag)
        self._close(complete=True)
        return True

    def _give_arguments(self, text: str) -> None:
        self._has_arguments = True
        self._arguments(text)

    def _close(self, *, complete: bool) -> None:
        if self._state == self._call_body:
            if complete and not self._has_arguments:
                self._arguments("{}")
            self._call_end()
        self._state = self._start

    def _finish(self, rest: str, complete: bool) -> None:
        if complete and self._state == self._reasoning_body:
            self._reasoning(rest)
        elif complete and self._state == self._text_body:
            self._content(rest)
        self._close(complete=complete)


def _recipient(header: str) -> str:
    """functions.f of "commentary to=functions.f <|constrain|>json"."""
    _, found, rest = header.partition("to=")
    return rest.partition("<")[0].split()[0] if found and rest.partition("<")[0].split() else ""


def harmony_grammar(grammar: Grammar, rules: CallRules) -> str:
    """Any messages of reasoning and comment, and at the end the answer or a call."""
    channel, message = grammar.tag(CHANNEL), grammar.tag(MESSAGE)
    grammar.add("lead", f'{channel} ("analysis" | "commentary") {message} TEXT')
    last = []
    for tool in rules.tools:
        head = f"{channel} {quoted('commentary to=' + _FUNCTIONS + tool.name)}"
        other = f'{quoted(" to=" + _FUNCTIONS + tool.name)} {channel} "commentary"'
        form = f'(" "? {grammar.tag(CONSTRAIN)} "json" | " json")?'
        last.append(f"({head} | {other}) {form} {message} {json_value(tool.schema)}")
    if not rules.required:
        last += [f'{channel} "final" {message} {grammar.answer or "TEXT"}', "lead"]
    return grammar.write(f'(lead {grammar.tag(END)} {grammar.tag(START)} "assistant")* {any_of(last)}')
