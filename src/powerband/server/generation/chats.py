"""From a chat request to its generation: prompt, sampling, and how the output is read."""

from __future__ import annotations

from powerband.core.params import SamplingParams
from powerband.engine.client.output_reader import OutputReader
from powerband.errors import InvalidRequest
from powerband.output_parsers.answer_grammar import answer_grammar
from powerband.output_parsers.tool_use import ToolUse, tool_use
from powerband.server.generation.engine_requests import Generation
from powerband.server.generation.prompts import chat_prompt
from powerband.server.generation.reasoning import keeps_reasoning, thinking_budget
from powerband.server.generation.sampling import chat_params
from powerband.server.generation.structured import asked_form, grammar
from powerband.server.protocol import ChatRequest
from powerband.server.replica import Model, ServerState


async def chat_generation(
    replica: ServerState, model: Model, body: ChatRequest, arrival_s: float, *, caps_max_tokens: bool = False
) -> Generation:
    """Raises InvalidRequest naming the place. caps_max_tokens: a max_tokens that the context has no room for means
    what it has room for.
    """
    use = tools_of(body, model)
    budget = thinking_budget(body, model)
    prompt = await chat_prompt(replica, model, body, None if use is None else use.for_template)
    if caps_max_tokens and body.max_tokens is not None:
        body.max_tokens = min(body.max_tokens, model.info.max_model_len - len(prompt.token_ids))
    params = chat_params(body, model, len(prompt.token_ids))
    end = model.format.continued(_last_text(body)) if body.continue_final_message else prompt.text or ""
    params = await _with_grammar(replica, model, body, params, end, use)
    reader = OutputReader(model.format, end, use, keeps_reasoning=keeps_reasoning(body), budget=budget)
    return Generation(replica, model, body, [prompt], params, arrival_s, reader)


async def count_tokens(replica: ServerState, model: Model, body: ChatRequest) -> int:
    """The number of tokens of the prompt. Raises InvalidRequest naming the place."""
    use = tools_of(body, model)
    prompt = await chat_prompt(replica, model, body, None if use is None else use.for_template)
    return len(prompt.token_ids)


async def _with_grammar(
    replica: ServerState, model: Model, body: ChatRequest, params: SamplingParams, end: str, use: ToolUse | None
) -> SamplingParams:
    """The parameters with a grammar for calls and for the form of an answer. Raises InvalidRequest naming the place."""
    asked = asked_form(body.response_format, body.structured_outputs)
    form = "" if asked is None else await grammar(replica, model, *asked)
    rules = None if use is None else use.rules
    if rules is None and not form:
        return params
    compile_form, token_id = model.need_grammars().grammar, model.need_tokenizer().token_id
    made = await replica.in_thread(answer_grammar, model.format, end, rules, form, token_id, compile_form)
    return params.with_grammar(made)


def tools_of(body: ChatRequest, model: Model) -> ToolUse | None:
    """Raises InvalidRequest naming the place."""
    use = tool_use(body.tools, body.tool_choice, body.parallel_tool_calls)
    if use is not None and use.rules is not None and not model.format.tools:
        raise InvalidRequest(
            "The format in which this model calls tools is not known.",
            hint="Leave 'tools' out, or start the server with --tool-call-parser NAME.",
            code="tools_not_supported",
            param="tools",
        )
    return use


def _last_text(body: ChatRequest) -> str:
    content = body.messages[-1].content or ""
    return content if isinstance(content, str) else "".join(part.text for part in content)
