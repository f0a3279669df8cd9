"""From `response_format` and `structured_outputs` to the grammar that an answer follows."""

from __future__ import annotations

from typing import Any

import msgspec

from powerband.core.params import SamplingParams
from powerband.core.structured_outputs import StructuredOutputsParams
from powerband.errors import InvalidRequest
from powerband.server.protocol import (
    GenerationRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
    StructuralTagFormat,
    StructuredOutputs,
    TextFormat,
)
from powerband.server.replica import Model, ServerState


async def with_grammar(
    replica: ServerState, model: Model, body: GenerationRequest, params: SamplingParams
) -> SamplingParams:
    """The parameters with the grammar of the form that the request asks for, if it does.

    Raises InvalidRequest naming the place.
    """
    asked = asked_form(body.response_format, body.structured_outputs)
    if asked is None:
        return params
    return params.with_grammar(await grammar(replica, model, *asked))


async def grammar(
    replica: ServerState, model: Model, outputs: StructuredOutputsParams, places: dict[str, str] | None = None
) -> str:
    """The grammar of a form. places: what errors call the fields of `outputs`. Raises InvalidRequest."""
    model.need_tokenizer()
    return await replica.in_thread(model.need_grammars().grammar, outputs, places)


def asked_form(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None
) -> tuple[StructuredOutputsParams, dict[str, str]] | None:
    """The form that a request asks for, and what its fields are called there; None where any text will do."""
    if isinstance(response_format, TextFormat):
        response_format = None
    if structured_outputs is None:
        return None if response_format is None else _of_response_format(response_format)
    if response_format is not None:
        raise InvalidRequest(
            "'response_format' and 'structured_outputs' both ask for a form.",
            hint="Send one of them.",
            param="structured_outputs",
        )
    fields = {name: value for name, value in msgspec.structs.asdict(structured_outputs).items() if value is not None}
    return StructuredOutputsParams(**fields), {}


def _of_response_format(format: ResponseFormat) -> tuple[StructuredOutputsParams, dict[str, str]]:
    match format:
        case JsonSchemaFormat(json_schema):
            place = "response_format.json_schema.schema"
            if json_schema.schema is not None:
                return StructuredOutputsParams(json=json_schema.schema), {"json": place}
        case StructuralTagFormat():
            tag: dict[str, Any] = {"type": "structural_tag"}
            tag |= {name: value for name, value in msgspec.structs.asdict(format).items() if value is not None}
            return StructuredOutputsParams(structural_tag=tag), {"structural_tag": "response_format"}
        case JsonObjectFormat() | TextFormat():
            pass
    return StructuredOutputsParams(json_object=True), {}
