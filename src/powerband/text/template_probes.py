"""Finds which parts of a conversation a chat template writes, by rendering it with marks in place of the contents.

When a template is loaded, marks show in which form it reads the content of each role, and whether it knows the role
"developer". When a conversation is rendered, they show whether a message is left out of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Renders a context; None where the template refuses it.
Render = Callable[[dict[str, Any]], str | None]

# A mark survives what templates do to text: trimming, another case, JSON.
_MARK = re.compile(r"kq(\d+)qk")
# Content in parts that was written as Python or JSON has it, and not as the text that it is.
_AS_DATA = re.compile(r"""text\\*['"]\s*:\s*\\*['"]kq\d""")
_NO_ROLE = "zqrole"
_KEY = "zqkey"
# How a message's content may be given: as text, as any number of parts, as a single part.
FORMS = ("text", "parts", "part")
# Per role, conversations that templates accept. "call": an assistant's message that calls a tool.
_CONVERSATIONS = {
    "user": (("user",), ("system", "user"), ("user", "assistant", "user")),
    "system": (("system", "user"), ("system", "user", "assistant", "user")),
    "assistant": (("user", "assistant", "user"), ("user", "assistant"), ("system", "user", "assistant", "user")),
    "tool": (("user", "call", "tool"), ("user", "call", "tool", "user")),
    "developer": (("developer", "user"), ("developer", "user", "assistant", "user")),
}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}},
}
_CALL = {"id": "call00000", "type": "function", "function": {"name": "probe", "arguments": {}}}


def learn(render: Render) -> dict[str, Any]:
    """{"forms": role → those of FORMS in which its content is read, "developer": whether that role is known, "tools":
    whether tools are written, "text_arguments": whether the arguments of a call are read as text only}.

    A template that writes any role as it is called does not know "developer".
    """
    forms: dict[str, list[str]] = {}
    for role, conversations in _CONVERSATIONS.items():
        forms[role] = [
            form for form in FORMS if any(_reads(render, role, form, roles, forms) for roles in conversations)
        ]
    return {
        "forms": forms,
        "developer": _knows_developer(render, forms),
        "tools": _writes_tools(render, forms),
        "text_arguments": not _writes_arguments(render, forms, {_KEY: ""})
        and _writes_arguments(render, forms, f'{{"{_KEY}": ""}}'),
    }


def _writes_tools(render: Render, forms: Mapping[str, list[str]]) -> bool:
    tool = {**_TOOL, "function": {**_TOOL["function"], "name": _KEY}}
    for roles in (("user",), ("system", "user")):
        messages = [_probe(role, _known_form(forms, role, "text")) for role in roles]
        if _KEY in (render(_context(messages, [tool])) or ""):
            return True
    return False


def _writes_arguments(render: Render, forms: Mapping[str, list[str]], arguments: Any) -> bool:
    call = {**_CALL, "function": {"name": "probe", "arguments": arguments}}
    messages = [_probe(role, _known_form(forms, role, "text")) for role in ("user", "call", "tool")]
    messages[1]["tool_calls"] = [call]
    return any(_KEY in (render(_context(messages, tools)) or "") for tools in ([_TOOL], None))


def left_out(render: Render, context: dict[str, Any]) -> list[int] | None:
    """[message] or [message, part or call] of the first content in `context` that the template leaves out; None: there
    is none.

    Text beside calls of tools need not be written: some templates leave it out. For a template that refuses marks,
    nothing is found.
    """
    messages, marks = _marked(context["messages"])
    text = render({**context, "messages": messages})
    if text is None:
        return None
    found = {int(mark) for mark in _MARK.findall(text.casefold())}
    for index, (parts, calls) in enumerate(marks):
        wanted = {*parts, *calls} - {0}
        if wanted and not wanted & found:
            return [index]
        lost = [place for place, mark in enumerate(calls or parts) if mark and mark not in found]
        if lost:
            return [index, lost[0]]
    return None


def _reads(render: Render, role: str, form: str, roles: Sequence[str], forms: Mapping[str, list[str]]) -> bool:
    """Whether the text of `role` is written, when its content has this form and the others' theirs."""
    for tools in (None, [_TOOL]):
        messages = [_probe(name, form if name == role else _known_form(forms, name, form)) for name in roles]
        messages, marks = _marked(messages)
        text = render(_context(messages, tools))
        wanted = {mark for name, (parts, _) in zip(roles, marks, strict=True) if name == role for mark in parts if mark}
        if text is None or _AS_DATA.search(text.casefold()):
            continue
        if wanted <= {int(mark) for mark in _MARK.findall(text.casefold())}:
            return True
    return False


def _known_form(forms: Mapping[str, list[str]], role: str, otherwise: str) -> str:
    known = forms.get("assistant" if role == "call" else role)
    return known[0] if known else otherwise


def _probe(role: str, form: str) -> dict[str, Any]:
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    more = {"tool_call_id": _CALL["id"], "name": "probe"} if role == "tool" else {}
    texts = [{"type": "text", "text": "x"}] * (2 if form == "parts" else 1)
    return {"role": role, "content": "x" if form == "text" else texts, **more}


def _context(messages: list[dict[str, Any]], tools: list[Any] | None) -> dict[str, Any]:
    return {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": True}


def _knows_developer(render: Render, forms: Mapping[str, list[str]]) -> bool:
    if not forms["developer"]:
        return False
    texts = []
    for role in ("developer", _NO_ROLE):
        messages = [_probe(role, forms["developer"][0]), _probe("user", _known_form(forms, "user", "text"))]
        text = render(_context(_marked(messages)[0], None))
        texts.append((text or "").casefold().replace("developer", _NO_ROLE))
    return texts[0] != texts[1]


def _marked(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[list[int], list[int]]]]:
    """The messages with a mark for every text and for the name of every call, and the marks of each message.

    Marks count from 1; an empty text has none (0).
    """
    last = 0

    def mark(text: Any) -> tuple[int, Any]:
        nonlocal last
        if not isinstance(text, str) or not text:
            return 0, text
        last += 1
        return last, f"kq{last}qk"

    marked: list[dict[str, Any]] = []
    marks: list[tuple[list[int], list[int]]] = []
    for message in messages:
        copy = dict(message)
        parts: list[int] = []
        calls: list[int] = []
        content = copy.get("content")
        if isinstance(content, list):
            pairs = [mark(part.get("text")) for part in content]
            parts = [number for number, _ in pairs]
            copy["content"] = [{**part, "text": text} for part, (_, text) in zip(content, pairs, strict=True)]
        else:
            number, copy["content"] = mark(content)
            parts = [number]
        if isinstance(copy.get("tool_calls"), list):
            copy["tool_calls"] = [_marked_call(call, mark, calls) for call in copy["tool_calls"]]
        marked.append(copy)
        marks.append((parts, calls))
    return marked, marks


def _marked_call(call: Any, mark: Callable[[Any], tuple[int, Any]], marks: list[int]) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not function.get("name"):
        return call
    number, name = mark(function["name"])
    marks.append(number)
    return {**call, "function": {**function, "name": name}}
