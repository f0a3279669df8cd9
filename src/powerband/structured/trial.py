"""A grammar is followed for some steps before a request gets it: some are compiled quickly and followed slowly."""

from __future__ import annotations

import random
import re
import time

from llguidance import LLMatcher

from powerband.errors import InvalidRequest

NUM_STEPS = 48
MAX_STEP_S = 0.05  # of one core: a step's masks are filled while the forward pass runs, and all requests wait for them
MAX_REPEATED = 20_000  # characters of a regular expression, with what is repeated written out

_ANY_BYTE = re.compile(rb"[^\0]")
_REPEAT = re.compile(r"\{(\d*)(,?)(\d*)\}|~\s*(\d+)(?:\s*\.\.\s*(\d+))?")


def follow(matcher: LLMatcher) -> None:
    """Write one answer by chance, or its beginning. Raises InvalidRequest where nothing can follow, or takes long."""
    chance = random.Random(0)  # noqa: S311 (the same one every time)
    for step in range(NUM_STEPS):
        began_s = time.thread_time()
        mask = matcher.compute_bitmask()
        choice = _ANY_BYTE.search(mask, chance.randrange(len(mask))) or _ANY_BYTE.search(mask)
        if choice is None or matcher.is_error():
            raise InvalidRequest("nothing satisfies it" if step == 0 else "some answers that it begins cannot end")
        if matcher.is_stopped():
            if step == 0:
                raise InvalidRequest("nothing but an empty answer satisfies it")
            return
        bits = choice[0][0]
        matcher.consume_token(8 * choice.start() + chance.choice([bit for bit in range(8) if bits >> bit & 1]))
        if time.thread_time() - began_s > MAX_STEP_S:
            raise InvalidRequest("following it takes too long; use fewer and shorter repetitions")


def check_repeats(text: str) -> None:
    """Raise InvalidRequest where repetitions in repetitions, written out, are too long. Takes linear time.

    text: a regular expression, or a grammar with some. What stands in classes and strings may count, too.
    """
    sizes = [0]  # of the groups that are open, from the outside to the inside
    last = 0  # of what stands before a repetition
    place = 0
    while place < len(text):
        char, step = text[place], 1
        repeat = _REPEAT.match(text, place) if char in "{~" else None
        if repeat is not None:
            counts = [int(count[:9]) for count in repeat.groups() if count and count.isdigit()]
            times, step = max(counts, default=1), repeat.end() - place
            sizes[-1] += last * (times - 1)
            last *= times
        elif char == "(":
            sizes.append(0)
            last = 0
        elif char == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        else:
            step = 2 if char == "\\" else 1
            last = 1
            sizes[-1] += 1
        if sizes[-1] > max(MAX_REPEATED, 2 * len(text)):
            raise InvalidRequest(
                f"its repetitions, written out, have more than {MAX_REPEATED} characters; use fewer and shorter ones"
            )
        place += step
