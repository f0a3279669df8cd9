"""Everything that shapes one replica's engine, as one flat, frozen value.

The same fields are flags (`--max-num-seqs`), environment variables (`POWERBAND_MAX_NUM_SEQS`), keys of a settings file and
keyword arguments of `powerband.LLM`. The commonest carry vLLM's names. `metadata["help"]` documents each one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    model: str = _setting("demo", "Folder, Hugging Face id, or 'demo' for the model in the package")
    revision: str | None = _setting(None, "Branch, tag or commit on the Hugging Face hub")
    tokenizer: str | None = _setting(None, "Folder or id of another tokenizer; default: the model's")
    served_model_name: str | None = _setting(None, "Name in the API; default: MODEL as given")
    chat_template: str | None = _setting(None, "File with a Jinja chat template that replaces the model's")
    load_format: Literal["auto", "dummy"] = _setting("auto", "'dummy' fills the weights with random numbers")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = _setting(
        "auto", "Precision of weights and activations; auto: as stored, where the device is fast at it"
    )
    max_model_len: int | None = _setting(None, "Longest prompt plus output, in tokens; default: the model's own")
    seed: int = _setting(0, "Seed for requests that bring none, and for dummy weights")

    device: Literal["auto", "cpu", "cuda"] = _setting("auto", "Where to compute")
    threads: int | None = _setting(None, "CPU threads for computing; default: all physical cores")
    attention_backend: Literal["auto", "reference", "triton"] = _setting("auto", "Implementation of attention")
    enforce_eager: bool = _setting(False, "CUDA: do not capture graphs")
    async_scheduling: bool | None = _setting(
        None, "Schedule the next step while one runs; default: on for CUDA, off for CPU"
    )

    block_size: int = _setting(32, "Tokens per block of KV cache")
    kv_cache_memory: str | None = _setting(None, "Memory for the KV cache, e.g. 4GiB; default: by the memory plan")
    gpu_memory_utilization: float = _setting(0.9, "Share of the device's memory that may be used in all (CUDA)")
    enable_prefix_caching: bool = _setting(True, "Reuse the KV of prompts that begin alike")

    max_num_seqs: int = _setting(256, "Requests that may run at once")
    max_num_batched_tokens: int = _setting(2048, "Token budget of a step")
    long_prefill_token_threshold: int = _setting(0, "Longest prefill chunk of one request in a step; 0: the budget")
    scheduling_policy: Literal["fcfs", "priority", "shortest", "longest-prefix", "deadline", "fair"] = _setting(
        "fcfs", "Which request is served first"
    )
    max_num_queued_reqs: int = _setting(2048, "Waiting requests beyond which new ones are refused (429)")
    max_num_queued_tokens: int = _setting(4_000_000, "Waiting prompt tokens beyond which new requests are refused (429)")
    step_log: str | None = _setting(None, "Append each step's shape and seconds to this file (JSON lines)")
