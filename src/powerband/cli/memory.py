"""`powerband memory`: where an engine's memory would go, from config.json alone; nothing is loaded."""

from __future__ import annotations

import json as json_format
from importlib.resources import files
from pathlib import Path
from typing import Any

from powerband.cli.flags import Json, takes_settings
from powerband.cli.machine import device_of
from powerband.cli.settings import Resolved
from powerband.cost.memory import MemoryPlan, plan_memory
from powerband.errors import EnvironmentFault
from powerband.spec.counts import count_parameters
from powerband.spec.device import detect_cpu
from powerband.spec.reader import read_model_spec
from powerband.spec.settings import EngineSettings

NOT_ABOUT_MEMORY = (
    *("tokenizer", "served_model_name", "chat_template", "load_format", "seed", "threads", "attention_backend"),
    *("async_scheduling", "enable_prefix_caching", "long_prefill_token_threshold", "scheduling_policy"),
    *("max_num_queued_reqs", "max_num_queued_tokens", "step_log"),
)


@takes_settings(EngineSettings, without=NOT_ABOUT_MEMORY)
def memory(settings: Resolved, *, json: Json = False) -> int:
    """Print the memory plan of MODEL on this machine, without loading it.

    MODEL may also be the path of a config.json. Of a model on the Hugging Face hub, only config.json is fetched.
    Exits with 3 and says what would help when the engine would not fit.
    """
    engine = settings.engine
    spec = read_model_spec(config_path(engine.model, engine.revision))
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


def plan_on_this_machine(spec: Any, settings: EngineSettings) -> MemoryPlan:
    """The plan for the device that the settings choose, with the memory that is free on it now."""
    if device_of(settings) == "cpu":
        cpu = detect_cpu()
        return plan_memory(spec, settings, cpu.memory_bytes, kind="cpu", free_memory_bytes=cpu.available_memory_bytes)
    import torch

    if not torch.cuda.is_available():
        raise EnvironmentFault("There is no GPU that torch can use.", hint="'powerband doctor' says what is missing.")
    free, total = torch.cuda.mem_get_info()
    return plan_memory(spec, settings, total, kind="cuda", free_memory_bytes=free)


def config_path(model: str, revision: str | None) -> Path:
    """Where the model's config.json is: in the package, on this machine, or fetched from the Hugging Face hub."""
    if model == "demo":
        return Path(str(files("powerband") / "demo" / "config.json"))
    if Path(model).exists() or model.count("/") != 1:
        return Path(model)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise EnvironmentFault(
            f"{model!r} is neither here nor to be had from the Hugging Face hub: {str(error).splitlines()[0]}",
            hint="Give a folder, the path of a config.json, a Hugging Face id, or 'demo'.",
            param="model",
        ) from error
