"""Whatever a config.json says, reading it ends soon: in a ModelSpec that can be counted with, or in a typed error."""

from __future__ import annotations

import time
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from published_configs import PUBLISHED

from powerband.errors import UsageError
from powerband.spec import read_model_spec
from powerband.spec.model.counts import count_parameters, step_flops
from powerband.spec.model.rope import rope_frequencies

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 3, 2**31, 2**63, 10**30, -1])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["default", "linear", "llama3", "yarn", "longrope", "dynamic", "su", "sliding_attention"])
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_KEYS = sorted({key for config in PUBLISHED.values() for key in config} | {"rope_parameters", "dtype", "text_config"})
_ROPE_KEYS = (
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "truncate"),
    *("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "mscale"),
    *("mscale_all_dim", "partial_rotary_factor", "full_attention", "sliding_attention"),
)


def _check(config: dict[str, Any]) -> None:
    start_s = time.process_time()
    try:
        spec = read_model_spec(config)
    except UsageError:
        return
    assert count_parameters(spec).total > 0
    assert step_flops(spec, [(3, 10)], 1).total > 0
    for rope in {layer.rope for layer in spec.layers}:
        assert rope is not None
        assert len(rope_frequencies(rope, spec.max_position)) == rope.rotary_dim // 2
    assert time.process_time() - start_s < 2


@settings(max_examples=150)
@given(
    base=st.sampled_from(list(PUBLISHED.values())), changes=st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=4)
)
def test_any_values_of_known_keys(base: dict[str, Any], changes: dict[str, Any]) -> None:
    _check({**base, **changes})


@settings(max_examples=150)
@given(
    base=st.sampled_from(list(PUBLISHED.values())),
    key=st.sampled_from(["rope_scaling", "rope_parameters"]),
    kind=st.sampled_from(["linear", "llama3", "yarn", "longrope", "dynamic"]),
    table=st.dictionaries(st.sampled_from(_ROPE_KEYS), _VALUES, max_size=5),
)
def test_any_values_of_rope_parameters(base: dict[str, Any], key: str, kind: str, table: dict[str, Any]) -> None:
    defaults = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    changed = {**base, "rope_scaling": None, key: {**defaults, **table}}
    _check(changed)


@settings(max_examples=100)
@given(st.dictionaries(st.text(max_size=20), _VALUES, max_size=6))
def test_anything_at_all(config: dict[str, Any]) -> None:
    _check(config)
