"""What is measured: the rows and their metrics. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

ROWS = {
    "a": "one stream, prompt 512, output 128",
    "b": "32 requests at once, prompt 256, output 128",
    "c": "prefill of 2,048 tokens",
    "d": "decode step",
    "e": "sampling at batch 32, cost over greedy",
    "f": "process start to first token",
    "g": "peak memory",
    "h": "over HTTP, prompt 256, output 64",
}
BATCHES = (32, 16, 8, 1)  # of row d: the largest first, then requests leave
CONTEXTS = (512, 2048)
CONCURRENCIES = (1, 8, 32)
HTTP_PROMPT, HTTP_OUTPUT = 256, 64
KINDS = {  # of sampling, as fields of vLLM's SamplingParams
    "top-p": {"temperature": 1.0, "top_p": 0.95},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
}


@dataclass(frozen=True)
class Metric:
    key: str  # begins with the row's letter
    title: str
    unit: str
    more_is_better: bool = False

    @property
    def row(self) -> str:
        return self.key[0]


def metrics(rows: str) -> list[Metric]:
    """All metrics of the rows, in the table's order."""
    found = [
        Metric("a ttft", "TTFT, prompt 512", "ms"),
        Metric("a tpot", "TPOT, context 512-640", "ms"),
        Metric("b throughput", "32 x (256 + 128) at once", "tok/s", True),
        Metric("c prefill", "prefill of 2,048", "tok/s", True),
    ]
    found += [
        Metric(step_key(batch, context), f"decode step, batch {batch}, context {context}", "ms")
        for context in CONTEXTS
        for batch in sorted(BATCHES)
    ]
    found += [Metric(f"e {kind}", f"{kind} at batch 32, over greedy", "ms") for kind in (*KINDS, "all three")]
    found += [Metric("f start", "process start to first token", "s"), Metric("g memory", "peak memory", "GiB")]
    for count in CONCURRENCIES:
        found.append(Metric(f"h throughput {count}", f"HTTP, {count} at once", "tok/s", True))
        found.append(Metric(f"h ttft {count}", f"HTTP, {count} at once: TTFT", "ms"))
    return [metric for metric in found if metric.row in rows]


def step_key(batch: int, context: int) -> str:
    return f"d step {batch}x{context}"


def step_shapes(quick: bool) -> list[tuple[int, list[int]]]:
    """Contexts of row d with their batches. Quick: 2,048 with few requests only, because the prompts take minutes."""
    return [(c, [b for b in BATCHES if not quick or c == CONTEXTS[0] or b <= 8]) for c in CONTEXTS]


def tokens_needed(rows: str, quick: bool) -> int:
    """Tokens of KV cache that the rows need at once."""
    needed = [32 * 64, 2048 + 64]
    if "b" in rows:
        needed.append(32 * (256 + 128))
    if "d" in rows:
        needed += [max(batches) * (context + 96) for context, batches in step_shapes(quick)]
    if "h" in rows:
        needed.append(32 * (HTTP_PROMPT + HTTP_OUTPUT))
    return max(needed) + 32 * 32  # whole blocks
