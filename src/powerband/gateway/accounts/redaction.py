"""Redacts personal data with a recognizable form: e-mail and IP addresses, phone and card numbers, IBANs, API keys.

It does not find names or postal addresses, and prefers to redact one number too many. The time is linear in the length
of the text: unbounded repetitions are possessive and start only at word boundaries.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

_KEY = re.compile(
    r"(?<![\w-])(?:"
    r"(?:(?:sk|pk|rk|pb|hf|gsk|xox[abprs]|gh[pousr]|github_pat|glpat)[-_]|AKIA|ASIA|AIza)[\w-]{12,}+"
    r"|eyJ[\w-]++\.[\w-]++\.[\w-]++"  # JSON web token
    r"|(?i:bearer)\s{1,4}+[\w.~+/=-]{16,}+)"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[A-Za-z0-9+/=\s]*+(?:-----END [A-Z ]{0,40}PRIVATE KEY-----)?"
)
_EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]++@(?:[\w-]{1,63}+\.)+[^\W\d_]{2,24}+")
_IBAN = re.compile(r"(?<![^\W_])[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]{4}){2,7}(?:[ -]?[A-Za-z0-9]{1,3})?(?![^\W_])")
_IPV4 = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?!\.?\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
_NUMBER = re.compile(r"\+?\(?\d(?:[ ./()-]{0,3}+\d)++")
_US_PHONE = re.compile(r"\(?\d{3}\)?[ .-]{1,2}\d{3}[ .-]\d{4}")
_MAX_DIGITS = 64  # a longer sequence of digits is not searched for card numbers


def redact(text: str) -> str:
    """The text with '[e-mail]', '[phone]', '[card]', '[iban]', '[ip]' and '[key]' instead of what was found."""
    text = _KEY.sub("[key]", text)
    text = _EMAIL.sub("[e-mail]", text)
    text = _replace(_IBAN, text, lambda found: "[iban]" if _is_iban(found) else None)
    text = _IPV4.sub(lambda match: "[ip]" if _is_ip(match[0]) else match[0], text)
    text = _replace(_IPV6, text, lambda found: "[ip]" if len(found) > 3 and _is_ip(found) else None)
    return _NUMBER.sub(lambda match: _number(match[0]), text)


def _replace(pattern: re.Pattern[str], text: str, kind: Callable[[str], str | None]) -> str:
    """Like `sub`, but a match that `kind` rejects is searched again from its second character on."""
    pieces, end, start = [], 0, 0
    while match := pattern.search(text, start):
        name = kind(match[0])
        if name is None:
            start = match.start() + 1
            continue
        pieces += [text[end : match.start()], name]
        end = start = match.end()
    return "".join([*pieces, text[end:]])


def _is_iban(text: str) -> bool:
    """ISO 13616: first four characters moved to the end, letters as numbers: the remainder modulo 97 is 1."""
    letters = re.sub("[ -]", "", text).upper()
    if not 15 <= len(letters) <= 34 or not letters.isascii():
        return False
    return int("".join(str(int(one, 36)) for one in letters[4:] + letters[:4])) % 97 == 1


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _number(text: str) -> str:
    digits = [int(one) for one in text if one.isdigit()]
    if len(digits) > _MAX_DIGITS:
        return "[number]"
    if _has_card(digits):
        return "[card]"
    if len(digits) >= 7 and text.startswith("+"):
        return "[phone]"
    if len(digits) >= 9 and text.lstrip("(").startswith("0"):
        return "[phone]"
    return "[phone]" if len(digits) <= 11 and _US_PHONE.search(text) else text


def _has_card(digits: list[int]) -> bool:
    """Whether 13 to 19 consecutive digits start like a card number and pass the check of ISO/IEC 7812 (Luhn)."""
    return any(
        digits[start] in (2, 3, 4, 5, 6) and _luhn(digits[start : start + length])
        for length in range(13, 20)
        for start in range(len(digits) - length + 1)
    )


def _luhn(digits: list[int]) -> bool:
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
