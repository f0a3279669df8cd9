"""`clean_up_tokenization_spaces`: spaces before punctuation and English contractions taken out of decoded text.

As in transformers (`clean_up_tokenization` of tokenization_utils_base.py), which does it for every model but BPE.
"""

from __future__ import annotations

_REPLACEMENTS = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")),
    *((" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)


def clean_up_spaces(text: str) -> str:
    for old, new in _REPLACEMENTS:
        text = text.replace(old, new)
    return text


class IncrementalSpaceCleanup:
    """`clean_up_spaces` of a text that grows: what is given out adds up to the cleaned whole.

    One step for each replacement; a step holds back the end of its text that may begin what it replaces.
    """

    def __init__(self) -> None:
        self._held = [""] * len(_REPLACEMENTS)

    def append(self, text: str) -> str:
        for step, (old, new) in enumerate(_REPLACEMENTS):
            *whole, rest = (self._held[step] + text).split(old)
            begins = next((length for length in range(len(old) - 1, 0, -1) if rest.endswith(old[:length])), 0)
            self._held[step] = rest[len(rest) - begins :]
            text = new.join([*whole, rest[: len(rest) - begins]])
        return text

    def flush(self) -> str:
        """What was held back."""
        text = ""
        for step, (old, new) in enumerate(_REPLACEMENTS):
            text = (self._held[step] + text).replace(old, new)
            self._held[step] = ""
        return text
