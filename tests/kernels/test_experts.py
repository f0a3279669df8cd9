"""All experts in one launch against the layer that runs them one by one."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

from test_decode_graphs import SPEC

from powerband.engine.layers.experts import Experts
from powerband.engine.layers.triton import run_experts

MIXTRAL = replace(SPEC, num_experts_per_token=2, expert_intermediate_size=40)
GPT_OSS = replace(MIXTRAL, router_bias=True, expert_bias=True, expert_activation="gpt_oss", num_experts_per_token=3)


@pytest.mark.parametrize("spec", [MIXTRAL, GPT_OSS], ids=["mixtral", "gpt_oss"])
@pytest.mark.parametrize("num_tokens", [1, 5, 70])
@torch.inference_mode()
def test_one_launch_equals_expert_by_expert(num_tokens, spec, device):
    experts = Experts(spec, 6, dtype=torch.float32, device=device)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(num_tokens, spec.hidden_size, generator=generator).to(device)
    expected = experts(x)
    experts.kernel = run_experts
    torch.testing.assert_close(experts(x), expected, atol=1e-3, rtol=1e-4)


def test_experts_without_tokens_take_no_part(device):
    """Everything goes to expert 4 of 6: the others' weights are not numbers and must not be read."""
    experts = Experts(MIXTRAL, 6, dtype=torch.float32, device=device)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.fill_(float("nan"))
        experts.gate_up[4] = 0.1
        experts.down[4] = 0.1
        x = torch.ones(3, MIXTRAL.hidden_size, device=device)
        chosen = torch.full((3, 1), 4, device=device)
        out = run_experts(experts, x, torch.ones(3, 1, device=device), chosen)
    assert out.isfinite().all()
    assert (out > 0).all()
