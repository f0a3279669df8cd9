"""What requests ask of a model's reasoning: how much of it, by what the chat template and the format offer."""

from __future__ import annotations

import contextlib
from typing import Any

from powerband.errors import InvalidRequest
from powerband.server.protocol import ChatRequest, ReasoningEffort, ReasoningSwitch
from powerband.server.replica import Model

_SWITCHES = ("enable_thinking", "thinking")  # variables of templates that turn reasoning on and off
# gpt-oss was trained with three efforts.
_GPT_OSS_EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}


def template_kwargs(body: ChatRequest, model: Model) -> dict[str, Any]:
    """`chat_template_kwargs`, and what `reasoning_effort` means to the template. What the former set counts.

    Raises InvalidRequest where the effort would have no effect; that of `reasoning` may have none.
    """
    kwargs: dict[str, Any] = dict(body.chat_template_kwargs or {})
    effort = body.reasoning_effort
    if effort is None:
        if (asked := _asked(body.reasoning)) is not None:
            with contextlib.suppress(InvalidRequest):
                _set_effort(kwargs, asked, model)
        return kwargs
    _set_effort(kwargs, effort, model)
    return kwargs


def _asked(switch: ReasoningSwitch | None) -> ReasoningEffort | None:
    if switch is None:
        return None
    if switch.enabled is False:
        return "none"
    return switch.effort or ("medium" if switch.enabled else None)


def _set_effort(kwargs: dict[str, Any], effort: ReasoningEffort, model: Model) -> None:
    """Raises InvalidRequest where it would have no effect."""
    template = model.need_template()
    if template.has_variable("reasoning_effort"):
        is_gpt_oss = model.format.reasoning == "openai_gptoss"
        if is_gpt_oss and effort not in _GPT_OSS_EFFORTS:
            raise _no_effect("reasoning_effort", f"is {effort!r}, but this model always reasons", "Send 'low'.")
        kwargs.setdefault("reasoning_effort", _GPT_OSS_EFFORTS[effort] if is_gpt_oss else effort)
    elif (switch := _switch(model)) is not None:
        kwargs.setdefault(switch, effort not in ("none", "minimal"))
    elif effort != "none" or model.format.reasoning:
        raise _no_effect("reasoning_effort", "has no effect: the model's chat template has no switch for reasoning")


def has_switch(model: Model) -> bool:
    """Whether the effort 'none' turns the reasoning off."""
    return not model.need_template().has_variable("reasoning_effort") and _switch(model) is not None


def _switch(model: Model) -> str | None:
    """The variable of the chat template that turns reasoning on and off."""
    template = model.need_template()
    return next((name for name in _SWITCHES if template.has_variable(name)), None)


def keeps_reasoning(body: ChatRequest) -> bool:
    """Whether the reasoning is part of the answer."""
    if body.include_reasoning is not None or body.reasoning is None:
        return body.include_reasoning is not False
    return not body.reasoning.exclude


def thinking_budget(body: ChatRequest, model: Model) -> int | None:
    """The maximum number of reasoning tokens. Raises InvalidRequest for a model that does not reason."""
    budget = body.thinking_token_budget
    if budget is None and body.reasoning is not None and model.format.reasoning:
        budget = body.reasoning.max_tokens
    if budget is None or budget < 0:
        return None
    if not model.format.reasoning:
        raise _no_effect("thinking_token_budget", "has no effect: no reasoning is recognized in this model's answers")
    return budget


def _no_effect(param: str, why: str, hint: str = "Leave it out.") -> InvalidRequest:
    return InvalidRequest(f"'{param}' {why}.", hint=hint, param=param, code="unsupported_parameter")
