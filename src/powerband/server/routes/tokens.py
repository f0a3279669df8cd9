"""/tokenize and /detokenize: what the model's tokenizer makes of a text, without generating."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from powerband.errors import InvalidRequest
from powerband.output_parsers.tool_use import tool_use
from powerband.server.generation.prompts import encode, render
from powerband.server.protocol import DetokenizeRequest, TokenizeRequest
from powerband.server.replica import ServerState
from powerband.server.replies import Detokenized, Tokenized
from powerband.web.errors import json_response


class TokenRoutes:
    def __init__(self, replica: ServerState) -> None:
        self._replica = replica

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text, or of a conversation as its template writes it."""
        replica = self._replica
        body = await replica.read(request, TokenizeRequest)
        replica.check_name(body.model)
        model = replica.model
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("Exactly one of 'prompt' and 'messages' is needed.", param="prompt")
        if body.messages is not None:
            use = tool_use(body.tools, None, None)
            tools = None if use is None else use.for_template
            text = await render(replica, model, body, body.messages, tools, body.chat_template_kwargs)
            ids = await encode(replica, model, text, body.add_special_tokens is True)
        else:
            _refuse_chat_fields(body)
            ids = await encode(replica, model, body.prompt or "", body.add_special_tokens is not False)
        tokenizer = model.need_tokenizer()
        pieces = [tokenizer.token(id) for id in ids] if body.return_token_strs else None
        return json_response(
            Tokenized(count=len(ids), max_model_len=model.info.max_model_len, tokens=ids, token_strs=pieces)
        )

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        replica = self._replica
        body = await replica.read(request, DetokenizeRequest)
        replica.check_name(body.model)
        model = replica.model
        tokenizer = model.need_tokenizer()
        if len(body.tokens) > model.info.max_model_len:
            raise InvalidRequest(
                f"'tokens' has {len(body.tokens)}; the limit is the context of {model.info.max_model_len}.",
                hint="Send them in parts.",
                param="tokens",
            )
        limit = model.info.vocab_size
        wrong = max(body.tokens, default=0)
        if wrong >= limit:
            raise InvalidRequest(f"Token {wrong} does not exist; the vocabulary ends at {limit - 1}.", param="tokens")
        text = await replica.in_thread(tokenizer.decode, body.tokens, bool(body.skip_special_tokens))
        return json_response(Detokenized(text))


def _refuse_chat_fields(body: TokenizeRequest) -> None:
    for name in ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
        if getattr(body, name) is not None:
            raise InvalidRequest(f"'{name}' has no effect without 'messages'.", param=name)
