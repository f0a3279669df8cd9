"""What has the form of personal data is taken out, what only looks like it stays, and no text takes long."""

from __future__ import annotations

import time

import pytest

from powerband.gateway.accounts.redaction import redact


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("Write to jane.doe+news@mail.example.co.uk, please.", "Write to [e-mail], please."),
        ("<JÜRGEN@EXAMPLE.DE>", "<[e-mail]>"),
        ("call +49 (0)30 1234-5678 now", "call [phone] now"),
        ("030 / 123 45 67 89", "[phone]"),
        ("(555) 123-4567 or 555.123.4567", "[phone] or [phone]"),
        ("card 4111 1111 1111 1111, 5500-0055-5555-5559", "card [card], [card]"),
        ("378282246310005", "[card]"),
        ("9 4111111111111111 9", "[card]"),
        ("IBAN DE89 3704 0044 0532 0130 00.", "IBAN [iban]."),
        ("gb82west12345698765432", "[iban]"),
        ("AB12 1234 DE89370400440532013000", "AB12 1234 [iban]"),
        ("from 192.168.0.17:8080 and 2001:db8::8a2e:370:7334", "from [ip]:8080 and [ip]"),
        ("key pb-AbCdEf0123456789_-xyz", "key [key]"),
        ("sk-proj-aaaaaaaaaaaaaaaaaaaa AKIAIOSFODNN7EXAMPLE ghp_0123456789abcdefABCDEF", "[key] [key] [key]"),
        ("Authorization: Bearer abcdef0123456789abcdef", "Authorization: [key]"),
        ("eyJhbGciOi.eyJzdWIiOi.SflKxwRJSM", "[key]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\n", "[key]\n"),
        ("7" * 70, "[number]"),
    ],
)
def test_personal_data_is_taken_out(text: str, redacted: str) -> None:
    assert redact(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "The 3 largest of 1,234,567 items cost 12.50 each, see page 1024.",
        "On 2026-11-22 at 12:30:45, version 1.2.3, std::vector, x::y, 5 : 3",
        "x = y[0] + 0.25 - 1e-9; 4111 1111 1111 1112 fails the check",
        "DE12 3456 is no account, 999.1.1.1 no address, a@b no mailbox",
        "skate-board-championship-2026",
        "",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert redact(text) == text


LONG = 1 << 18
HOSTILE = [
    "a" * LONG,
    "1" * LONG,
    "1 " * (LONG // 2),
    "a@" * (LONG // 2),
    "a@" + "a." * (LONG // 2),
    "a:" * (LONG // 2),
    "AB12" * (LONG // 4),
    "AB12 1234 1234 " * (LONG // 15),
    "eyJa." * (LONG // 5),
    "-----BEGIN A PRIVATE KEY-----" * (LONG // 29),
    "1.1.1." * (LONG // 6),
    "+1 (" * (LONG // 4),
    ("1" * 60 + " x ") * (LONG // 63),
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:15])
def test_a_long_text_of_anything_takes_a_moment(text: str) -> None:
    start_s = time.process_time()
    redact(text)
    assert time.process_time() - start_s < 5  # a second or less; what backtracks would take hours
