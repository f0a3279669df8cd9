"""Fields of requests and of the model list, as any client or server may send them: only those that Powerband reads."""

from __future__ import annotations

import contextlib

import msgspec
from msgspec import Raw

from powerband.openai.chunks import INVALID_JSON

# Fields that hold the prompt, and the paths that take them.
PROMPT_PATHS = {
    "messages": "/v1/chat/completions",
    "prompt": "/v1/completions",
    "input": "/v1/responses or /v1/embeddings",
}


class StreamOptionFields(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class TextPart(msgspec.Struct, gc=False):
    """A part of a message; without `text`, it is an image or other media."""

    text: str | None = None


class MessageFields(msgspec.Struct, gc=False):
    role: str = ""
    content: str | list[TextPart] | None = None

    @property
    def texts(self) -> list[str]:
        if isinstance(self.content, str):
            return [self.content]
        return [part.text for part in self.content or () if part.text is not None]


class ListedModel(msgspec.Struct, gc=False):
    id: str
    owned_by: str | None = None
    parent: object = None  # of a LoRA adapter: its base model (vLLM, Powerband)
    max_model_len: object = None  # vLLM, SGLang, Powerband
    listed_length: object = msgspec.field(default=None, name="context_length")  # OpenRouter and others
    context_window: object = None  # Groq
    max_context_length: object = None  # LM Studio, Mistral

    @property
    def context_length(self) -> int | None:
        """Maximum tokens of prompt and output together."""
        lengths = (self.max_model_len, self.listed_length, self.context_window, self.max_context_length)
        return next((n for n in lengths if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


class _ModelList(msgspec.Struct):
    data: list[Raw] | None = None


_LIST = msgspec.json.Decoder(_ModelList)
_MODEL = msgspec.json.Decoder(ListedModel)


def read_models(body: bytes) -> list[ListedModel]:
    """Parse the response to GET /v1/models. Invalid entries are left out."""
    found: list[ListedModel] = []
    with contextlib.suppress(*INVALID_JSON):
        for entry in _LIST.decode(body).data or ():
            with contextlib.suppress(*INVALID_JSON):
                found.append(_MODEL.decode(entry))
    return found
