"""`powerband memory`: where an engine's memory would go, from config.json alone; nothing is loaded."""

from __future__ import annotations

import json as json_format
from typing import Any

from powerband.cli.flags import Json, takes_settings
from powerband.engine.this_machine import config_source, plan_on_this_machine
from powerband.spec.model.counts import count_parameters
from powerband.spec.model.reader import converted, read_model_spec
from powerband.spec.settings import EngineSettings
from powerband.spec.settings_layers import Resolved

NOT_ABOUT_MEMORY = (
    *("tokenizer", "served_model_name", "chat_template", "load_format", "seed", "threads", "attention_backend"),
    *("tool_call_parser", "reasoning_parser", "generation_config"),
    *("async_scheduling", "enable_prefix_caching", "long_prefill_token_threshold", "scheduling_policy"),
    *("max_num_queued_reqs", "max_num_queued_tokens", "step_log", "weight_cache"),
)


@takes_settings(EngineSettings, without=NOT_ABOUT_MEMORY)
def memory(settings: Resolved, *, json: Json = False) -> int:
    """Print the memory plan of MODEL on this machine, without loading it.

    MODEL may also be the path of a config.json. Of a model on the Hugging Face hub, everything but
    the weights is fetched.
    Exits with 3 and suggests changes if the engine does not fit.
    """
    engine = settings.engine
    spec = converted(read_model_spec(config_source(engine)), engine.convert)
    plan = plan_on_this_machine(spec, engine)
    if json:
        report: dict[str, Any] = {
            "model": engine.model,
            "family": spec.family,
            "parameters": count_parameters(spec).total,
        }
        print(json_format.dumps({**report, **plan.as_dict()}, indent=2))
    else:
        print(f"{engine.model}: {spec.family}, {count_parameters(spec).total:,} parameters\n{plan.table()}")
    return 0
