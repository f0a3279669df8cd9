"""Mistral: [TOOL_CALLS][{"name": "f", "arguments": {…}}, …], or since tokenizer v11 [TOOL_CALLS]f[ARGS]{…} for each."""

from __future__ import annotations

from dataclasses import replace

from powerband.output_parsers.grammar import CallRules, Grammar, any_of, json_object_call, json_value, quoted
from powerband.output_parsers.json_call import JsonCall, JsonValue
from powerband.output_parsers.text_parser import MAX_NAME_CHARS, TextParser

TAG, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class MistralParser(TextParser):
    """Both formats, whichever the model writes."""

    def __init__(self) -> None:
        super().__init__()
        self._call = self._new_call()
        self._value = JsonValue()
        self._name = ""
        self._raw: list[str] = []  # since the tag, until a name is known
        self._in_list = False

    @property
    def in_call(self) -> bool:
        return self._state != self._start

    def _new_call(self) -> JsonCall:
        return JsonCall(self._call_start, self._arguments)

    def _start(self) -> bool:
        if not self._until((TAG,), self._content):
            return False
        self._raw = [TAG]
        self._state = self._after_tag
        return True

    def _after_tag(self) -> bool:
        if not self._skip_space():
            return False
        self._in_list = self._text[self._at] == "["
        self._state = self._item if self._in_list or self._text[self._at] == "{" else self._named
        self._at += self._in_list
        self._raw.append("[" * self._in_list)
        self._call = self._new_call()
        return True

    def _item(self) -> bool:
        call, begin = self._call, self._at
        self._at = call.feed(self._text, begin)
        if not call.name:
            self._raw.append(self._text[begin : self._at])
        if call.failed and not call.name:
            self._content("".join(self._raw) if not self.num_calls else "")
            self._state = self._start
        elif call.failed or call.done:
            self._call_end()
            self._state = self._after_item if self._in_list and call.done else self._start
        return True

    def _after_item(self) -> bool:
        if not self._skip_space():
            return False
        char = self._text[self._at]
        self._at += char in ",]"
        self._call = self._new_call()
        self._state = self._item if char == "," else self._start
        return True

    def _named(self) -> bool:
        """f[ARGS]{…}, f[CALL_ID]abc[ARGS]{…} or f{…}"""
        begin = self._at
        limit = begin + MAX_NAME_CHARS
        again = self._text.find(TAG, begin, limit + len(TAG))  # what stands before another one is no name
        limit = again if again >= 0 else limit
        places = [place for tag in (ARGUMENTS, "{") if (place := self._text.find(tag, begin, limit)) >= 0]
        if not places:
            if len(self._text) - begin < MAX_NAME_CHARS and again < 0:
                return False
            self._content("".join(self._raw))
            self._state = self._start
            return True
        end = min(places)
        name, _, id = self._text[begin:end].partition(CALL_ID)
        self._at = end + (len(ARGUMENTS) if self._text.startswith(ARGUMENTS, end) else 0)
        if not name.strip():
            self._content("".join(self._raw))
            self._state = self._start
            return True
        self._call_start(name.strip(), id.strip())
        self._value = JsonValue()
        self._state = self._before_value
        return True

    def _before_value(self) -> bool:
        if not self._skip_space():
            return False
        self._state = self._in_value if self._text[self._at] == "{" else self._value_end
        return True

    def _in_value(self) -> bool:
        end = self._value.feed(self._text, self._at)
        self._arguments(self._text[self._at : end])
        self._at = end
        if self._value.done:
            self._state = self._value_end
            self._value_end()
        return True

    def _value_end(self) -> bool:
        if not self._value.done:
            self._arguments("{}")
        self._call_end()
        self._state = self._start
        return True

    def _finish(self, rest: str, complete: bool) -> None:
        if self._state == self._start:
            self._content(rest if complete else "")
        elif self._call.name if self._state == self._item else self._state in (self._before_value, self._in_value):
            self._call_end()


def mistral_grammar(grammar: Grammar, rules: CallRules) -> str:
    """The format with a list of objects, of tokenizers before v11."""
    call = any_of([json_object_call(tool, "arguments") for tool in rules.tools])
    more = f' (", " {call})*' if rules.parallel else ""
    once = replace(rules, parallel=False)  # one list has all calls
    return grammar.tagged_calls(TAG, f'WS? "[" {call}{more} "]"', once)


def mistral_v11_grammar(grammar: Grammar, rules: CallRules) -> str:
    calls = [f"{quoted(tool.name)} {grammar.tag(ARGUMENTS)} {json_value(tool.schema)}" for tool in rules.tools]
    return grammar.tagged_calls(TAG, any_of(calls), rules)
