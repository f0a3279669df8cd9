"""What planning assumes of an engine where nothing was measured: its step, its host's overhead, its memory.

Everything else that engines differ in is in `engines/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from powerband.spec.deployment import EngineName
from powerband.spec.hardware.profile import Evidence, HostModel

# Overhead on a server's host, in seconds. vLLM, and HTTP in front of it: inference-sim's law, fitted to vLLM on H100
# (0.13 ms a step and 32 us a layer, whose kernels are in it; 4.4 us and, at its arrival, 15.6 ms a request).
# TensorRT-LLM: AIConfigurator's authors see 0 to 0.6 ms a step. The others are taken to be like them.
_HOST = HostModel(
    step_s=0.5e-3,
    per_request_s=5e-6,
    arrival_s=15e-3,
    front_s=1.5e-3,
    answer_s=1e-3,
    layer_s=100e-6,
    overlapped=False,
    evidence=Evidence(source="prior: engines' own overhead on a server's host", error=0.5),
)


# Of each request whose answer has a grammar, in each step. Measured with our engine on a Xeon (Sapphire Rapids),
# llguidance 1.9 and a vocabulary of 4,096 tokens: 2 us to follow the grammar by a token, 2 us to look for tokens that
# it forces, 7 to 8 us for a mask. Masks are filled beside the forward pass, which on a CPU computes on the same cores.
_GRAMMAR_STEP_S = 4e-6
_GRAMMAR_MASK_S = 8e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePriors:
    """The defaults are vLLM's."""

    host: HostModel = _HOST
    # Kernels of a layer beside products and attention: norms, rotary and cache write, activation.
    kernels_per_layer: float = 5.0
    # Sizes of a step of decodes for which CUDA graphs are captured; a step is padded to the next.
    graph_sizes: tuple[int, ...] = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
    # A step with prefills in it takes as long as theirs and one of its decodes together: decodes gain nothing from
    # weights that are read anyway. So it is in TensorRT-LLM's closed-loop figures, with every model and any ranks;
    # vLLM's and those of our engine show the gain.
    separates_decodes: bool = False
    quantizes_head: bool = False  # to 8 bits, beside layers that it quantizes itself
    is_measured_on_gpus: bool = True  # else its models of operators are those of other engines
    limits_queue: bool = False  # refuses requests instead of queueing without end
    uses_memory_plan: bool = False  # cost.memory, on one device without offload: the plan that it prints and obeys
    block_size: int = 16  # tokens of a block of the KV cache
    # Whether it keeps only the last blocks of layers with a sliding window, in shared pages: vLLM's hybrid KV
    # cache manager, on GPUs, and our own engine everywhere, by its memory plan.
    frees_windows: bool = False
    # Of models in these families: how many positions layers with a window hold for each one that the others do, in a
    # pool of their own (SGLang's swa_full_tokens_ratio).
    window_share: float = 1.0
    window_families: tuple[str, ...] = ()
    # Of each logit that a profiling step samples: in 16 and 32 bits, probabilities, noise. vLLM 0.18 and 0.19 on an
    # H100 with 1,024 sequences: 15 for each of five models (100,352 to 256,000 words). Before 0.17 it sorted them: 36.
    sampler_bytes_per_logit: int = 15
    # A request with a grammar is scheduled when its last token is known, so that no step of such requests is prepared
    # while the one before it runs.
    overlaps_grammars: bool = True

    def host_with_grammars(self, host: HostModel, *, is_cpu: bool) -> HostModel:
        """The same host, where every answer has a grammar."""
        return replace(
            host,
            per_request_s=host.per_request_s + _GRAMMAR_STEP_S + (_GRAMMAR_MASK_S if is_cpu else 0.0),
            overlapped=host.overlapped and self.overlaps_grammars,
        )


ENGINE_PRIORS: Mapping[EngineName, EnginePriors] = {
    "powerband": EnginePriors(
        host=replace(_HOST, step_s=0.3e-3, per_request_s=3e-6, arrival_s=3e-3, front_s=0.5e-3, overlapped=True),
        graph_sizes=(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512),
        quantizes_head=True,
        is_measured_on_gpus=False,
        limits_queue=True,
        uses_memory_plan=True,
        overlaps_grammars=False,
        block_size=32,
        frees_windows=True,
    ),
    "vllm": EnginePriors(frees_windows=True),
    "sglang": EnginePriors(
        host=replace(_HOST, layer_s=90e-6, overlapped=True), window_share=0.8, window_families=("gpt_oss", "gemma2")
    ),
    "trtllm": EnginePriors(
        host=replace(_HOST, step_s=0.3e-3, arrival_s=8e-3, layer_s=60e-6),
        kernels_per_layer=4.0,
        graph_sizes=(1, 2, 4, *range(8, 129, 8), *range(144, 513, 16), *range(576, 2049, 64)),
        separates_decodes=True,
        block_size=32,
        sampler_bytes_per_logit=8,  # in 32 bits, twice: it samples in place
    ),
}
