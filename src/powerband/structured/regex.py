r"""Regular expressions of requests in the dialect of llguidance, which is that of Rust's regex crate.

`\w`, `\d`, `\s` and their opposites differ between dialects in characters outside ASCII. What is matched here is what
Python's `re` and ECMAScript both match, so that an answer satisfies both.
"""

from __future__ import annotations

# What every dialect counts among the letters, digits or spaces, and what any of them does. Parts of a bracket.
_IN_ALL = {"w": "0-9A-Za-z_", "d": "0-9", "s": r" \t\n\r\f\v"}
_IN_ANY = {"w": r"\w\p{N}", "d": r"\d", "s": r"\s\x1c-\x1f\x{feff}"}


def portable(pattern: str) -> str:
    """The pattern, with classes of characters that mean the same everywhere."""
    parts: list[str] = []
    in_class = is_negated = False
    place = 0
    while place < len(pattern):
        char = pattern[place]
        if char == "\\" and place + 1 < len(pattern):
            parts.append(_escape(pattern[place + 1], in_class=in_class, is_negated=is_negated))
            place += 2
            continue
        if in_class and char == "[":
            parts.append(r"\[")  # Python and ECMAScript have no classes in classes
        elif in_class and char in "&~-" and pattern[place + 1 : place + 2] == char:
            parts.append("\\" + char)  # nor operators between them
        else:
            parts.append(char)
            if char == "[":
                in_class, is_negated = True, pattern[place + 1 : place + 2] == "^"
                ahead = 2 if is_negated else 1
                if pattern[place + ahead : place + ahead + 1] == "]":  # a bracket at the beginning is itself
                    parts.append(pattern[place + 1 : place + ahead] + r"\]")
                    place += ahead
            elif char == "]":
                in_class = is_negated = False
        place += 1
    return "".join(parts)


def _escape(char: str, *, in_class: bool, is_negated: bool) -> str:
    kind = char.lower()
    if char in _IN_ALL:
        members = _IN_ANY[char] if is_negated else _IN_ALL[char]
        return members if in_class else f"[{members}]"
    if kind in _IN_ALL:
        return f"[^{_IN_ALL[kind] if is_negated else _IN_ANY[kind]}]"
    if char == "/":  # which grammars escape themselves
        return char
    if char == "Z":  # Python's end of the text
        return "$"
    return "\\" + char
