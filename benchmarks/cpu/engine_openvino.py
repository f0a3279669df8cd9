"""OpenVINO GenAI's continuous batching pipeline in this process, for worker.py. Runs in the peer's environment."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

_NAMES = ("temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logprobs")


class OpenVino:
    def __init__(self, job: dict[str, Any]) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 2048
        scheduler.max_num_seqs = 32
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = -(-job["kv_bytes"] // 2**30)  # GiB
        properties = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": job["threads"]}
        self._pipeline = genai.ContinuousBatchingPipeline(job["model"], scheduler, "CPU", properties | job["options"])
        self._handles: dict[int, Any] = {}
        self.versions = {name: version(name) for name in ("openvino", "openvino-genai")}

    @property
    def busy(self) -> bool:
        return bool(self._pipeline.has_non_finished_requests())

    def add(self, id: int, prompt: list[int], max_tokens: int, sampling: dict[str, Any]) -> None:
        config = genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        for name in _NAMES:
            if name in sampling:
                setattr(config, name, sampling[name])
        config.do_sample = sampling["temperature"] > 0
        if not config.do_sample:
            config.temperature = 1.0
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        self._handles[id] = self._pipeline.add_request(id, ids, config)

    def step(self) -> dict[int, int]:
        self._pipeline.step()
        tokens = {}
        for id, handle in self._handles.items():
            if handle.can_read():
                tokens[id] = sum(len(output.generated_ids) for output in handle.read().values())
        running = genai.GenerationStatus.RUNNING
        self._handles = {id: handle for id, handle in self._handles.items() if handle.get_status() == running}
        return tokens

    def cancel(self, ids: Iterable[int]) -> None:
        for id in ids:
            if id in self._handles:
                self._handles.pop(id).cancel()


def make(job: dict[str, Any]) -> OpenVino:
    return OpenVino(job)
