"""What a request asks of pooling: one vector for its whole prompt, and no output tokens."""

from __future__ import annotations

from dataclasses import dataclass

from powerband.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """How one prompt becomes a vector. Names are vLLM's. Raises InvalidRequest naming the field.

    What is pooled (last token, mean, …) is the checkpoint's own matter, see spec.model.pooling.
    """

    dimensions: int | None = None  # keep only the first ones; None: all
    use_activation: bool | None = None  # normalise the embedding, or apply the scorer's activation; None: the model's
    second_text_start: int | None = None  # of a pair: the first token of its second text, for models with token types

    def __post_init__(self) -> None:
        if self.dimensions is not None and (type(self.dimensions) is not int or self.dimensions < 1):
            raise InvalidRequest(
                f"dimensions is {self.dimensions!r}; it must be a whole number of at least 1.", param="dimensions"
            )
        if self.use_activation not in (None, True, False):
            raise InvalidRequest(
                f"use_activation is {self.use_activation!r}; it must be true or false.", param="use_activation"
            )
