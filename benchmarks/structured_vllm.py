"""The steps of structured.py in vLLM for CPUs: run by it in vLLM's environment.

    VLLM/bin/python benchmarks/structured_vllm.py FOLDER ROUNDS TOKENS BATCH… < {"form": schema or null, …}

Writes JSON: for each batch and form the turns, each with the seconds of steps that gave a token to every answer, the
seconds of an answer (mean), and those of the processors.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

# One process, so that a step can be timed.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}"}


def measure(llm: Any, params: list[Any]) -> dict[str, Any]:
    """One turn: a batch of answers."""
    engine = llm.llm_engine
    for i, own in enumerate(params):
        engine.add_request(f"{time.monotonic_ns()}-{i}", {"prompt_token_ids": [5 + i, 6, 7]}, own)
    decodes, answers_s, seen = [], 0.0, {}
    began_cpu_s = time.process_time()
    while engine.has_unfinished_requests():
        began_s = time.perf_counter()
        outputs = engine.step()
        seconds, count = time.perf_counter() - began_s, 0
        for output in outputs:
            tokens = len(output.outputs[0].token_ids)
            count += tokens - seen.get(output.request_id, 0)
            seen[output.request_id] = tokens
        answers_s += seconds * len(outputs) / len(params)
        decodes += [seconds] if count == len(params) else []
    return {"steps": decodes[2:], "seconds": answers_s, "cpu_s": time.process_time() - began_cpu_s}


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    folder, rounds, tokens, *batches = sys.argv[1], *map(int, sys.argv[2:])
    forms = json.load(sys.stdin)
    llm = LLM(
        folder,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=32,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
    )
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for batch in batches:
        into = results.setdefault(str(batch), {name: [] for name in forms})
        for turn in range(rounds + 1):
            for name, form in forms.items():
                own = None if form is None else StructuredOutputsParams(**form)
                params = [
                    SamplingParams(
                        temperature=0.8,
                        seed=1000 * turn + i,
                        max_tokens=tokens,
                        ignore_eos=True,
                        detokenize=False,
                        structured_outputs=own,
                    )
                    for i in range(batch)
                ]
                found = measure(llm, params)
                into[name] += [found] if turn else []  # the first warms up
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
