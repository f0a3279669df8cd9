"""Stop strings against a search of the whole text, and what finding them takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from powerband.engine.client.output import StopFinder, StopStrings

LETTERS = st.text("abc", min_size=1, max_size=6)


def first_completed(text: str, stop: list[str]) -> tuple[int, str] | None:
    """Where the first string ends, and which; of several that end together, the longest."""
    for end in range(1, len(text) + 1):
        found = [one for one in stop if text[:end].endswith(one)]
        if found:
            return end, max(found, key=len)
    return None


def begins_one(text: str, stop: list[str]) -> str:
    """The longest end of the text that begins a string, but is not all of it."""
    ends = (text[start:] for start in range(len(text) + 1))
    return next(end for end in ends if any(one.startswith(end) and one != end for one in [*stop, "x"]))


@given(st.lists(LETTERS, max_size=5), st.lists(st.text("abc", max_size=4), max_size=10))
def test_strings_are_found_as_in_the_whole_text(stop: list[str], pieces: list[str]) -> None:
    finder, given_out, text = StopFinder(stop), "", ""
    for piece in pieces:
        given_out += finder.feed(piece)
        text += piece
        wanted = first_completed(text, stop)
        if wanted is not None:
            end, found = wanted
            assert (finder.found, finder.held, given_out) == (found, "", text[: end - len(found)])
            return
        assert finder.found == ""
        assert (given_out + finder.held, finder.held) == (text, begins_one(text, stop))


@given(st.lists(LETTERS, min_size=1, max_size=5), st.text("abc", max_size=20))
def test_early_strings_are_plain_text(stop: list[str], text: str) -> None:
    finder = StopFinder(stop)
    given_out = "".join(finder.feed(char, may_end=False) for char in text)
    assert finder.found == ""
    assert (given_out + finder.held, finder.held) == (text, begins_one(text, stop))


def test_a_text_is_read_in_as_many_steps_as_it_has_characters() -> None:
    """Each step may fall back, but together they fall no further than they rose."""
    counted = 0

    class Counting(StopStrings):
        def _child(self, state: int, char: str) -> int:
            nonlocal counted
            counted += 1
            return super()._child(state, char)

    strings = Counting(["a" * (250 - i) + "b" for i in range(16)])
    counted, state = 0, 0
    for char in ("a" * 249 + "c") * 100:
        state = strings.step(state, char)
    assert counted < 2.1 * 25_000


def test_alike_strings_share_their_beginnings() -> None:
    assert len(StopStrings(["a" * 255 + chr(ord("b") + i) for i in range(16)]).ends) == 256 + 16
    assert len(StopStrings([chr(ord("b") + i) + "a" * 255 for i in range(16)]).ends) == 16 * 256 + 1
