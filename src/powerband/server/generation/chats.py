"""From a chat request to its generation: prompt, sampling, and how the output is read."""

from __future__ import annotations

from dataclasses import replace

from powerband.core.params import SamplingParams
from powerband.core.structured_outputs import StructuredOutputsParams
from powerband.errors import InvalidRequest
from powerband.output_parsers.grammar import CallRules
from powerband.output_parsers.tool_schemas import with_enforced_schemas
from powerband.output_parsers.tool_use import ToolUse, tool_use
from powerband.server.generation.engine_requests import Generation
from powerband.server.generation.output_reader import OutputReader
from powerband.server.generation.prompts import chat_prompt
from powerband.server.generation.reasoning import thinking_budget
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
    reader = OutputReader(model.format, end, use, keeps_reasoning=body.include_reasoning is not False, budget=budget)
    return Generation(replica, model, body, [prompt], params, arrival_s, reader)


async def count_tokens(replica: ServerState, model: Model, body: ChatRequest) -> int:
    """The number of tokens of the prompt. Raises InvalidRequest naming the place."""
    use = tools_of(body, model)
    prompt = await chat_prompt(replica, model, body, None if use is None else use.for_template)
    return len(prompt.token_ids)


async def _with_grammar(
    replica: ServerState, model: Model, body: ChatRequest, params: SamplingParams, end: str, use: ToolUse | None
) -> SamplingParams:
    """The parameters with a grammar for calls, and for the form of an answer. Raises InvalidRequest naming the place.

    Schemas of tools that are not strict are left out where they cannot be enforced: their arguments are any object.
    """
    asked = asked_form(body.response_format, body.structured_outputs)
    form = "" if asked is None else await grammar(replica, model, *asked)
    rules = None if use is None else use.rules
    if rules is None and not (form and model.format.reasoning):
        return params.with_grammar(form) if form else params
    token_id = model.need_tokenizer().token_id

    def write(rules: CallRules | None) -> StructuredOutputsParams:
        return StructuredOutputsParams(grammar=model.format.grammar(end, rules, token_id, form))

    place = {"grammar": "tools" if rules is not None else "response_format"}
    try:
        wanted = rules and await replica.in_thread(with_enforced_schemas, rules)
        return params.with_grammar(await grammar(replica, model, await replica.in_thread(write, wanted), place))
    except ValueError:
        raise InvalidRequest(
            "This form of the answer cannot be combined with tools or reasoning.",
            hint="Leave 'tools' out, and turn reasoning off.",
            param="structured_outputs",
        ) from None
    except InvalidRequest:
        if rules is None or any(tool.strict for tool in rules.tools):
            raise
    plain = replace(rules, tools=[replace(tool, schema={"type": "object"}) for tool in rules.tools])
    return params.with_grammar(await grammar(replica, model, write(plain), place))


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
