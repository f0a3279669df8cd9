"""Rotary embeddings: from a config.json's keys to a RopeSpec, and from a RopeSpec to frequencies.

Formulas and defaults are those of transformers' `modeling_rope_utils` (linear: Chen et al. 2023, arXiv 2306.15595;
yarn: Peng et al. 2023, arXiv 2309.00071; longrope: Ding et al. 2024, arXiv 2402.13753; llama3: Llama 3.1's release).
Checkpoints say it in two ways, and both are read: `rope_theta` beside `rope_scaling`, or all in `rope_parameters`.
"""

from __future__ import annotations

import math

from powerband.spec.config_reader import MAX_POSITIONS, ConfigReader, shown
from powerband.spec.model.model_spec import RopeSpec


def read_rope(fields: ConfigReader, head_dim: int, max_position: int, *, default_theta: float = 10_000.0) -> RopeSpec:
    """The one RopeSpec of a model whose layers all rotate alike. Raises UsageError."""
    table = fields.table("rope_scaling") or fields.table("rope_parameters") or ConfigReader({}, fields.source)
    theta = table.number("rope_theta", fields.number("rope_theta", default_theta, low=1.0), low=1.0)
    partial = table.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0, high=1.0), high=1.0)
    if _kind(table) == "default" and fields.values.get("model_type") != "phi3":
        partial = 1.0  # as in transformers, where of these families only Phi-3 reads it unless rope is scaled
    return rope_from_table(fields, table, head_dim, max_position, theta=theta, partial=partial)


def rope_from_table(
    fields: ConfigReader, table: ConfigReader, head_dim: int, max_position: int, *, theta: float, partial: float = 1.0
) -> RopeSpec:
    """A RopeSpec from one table of rope parameters; `fields` may hold the original length. Raises UsageError."""
    nested = [key for key, value in table.values.items() if isinstance(value, dict)]
    if nested:
        raise table.error(f"parameters per kind of layer ({', '.join(nested)}) exist only for Gemma 3", nested[0])
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise fields.error(f"{rotary_dim} of a head's {head_dim} dimensions rotate; it must be even", "head_dim")
    plain = RopeSpec(theta=theta, rotary_dim=rotary_dim)
    kind = _kind(table)
    if fields.values.get("model_type") == "phi3" and kind in ("su", "yarn"):  # earlier names of longrope
        kind = "longrope"
    original = _original_length(fields, table, max_position) if kind in ("llama3", "yarn", "longrope") else 0
    match kind:
        case "default":
            return plain
        case "dynamic":
            if rotary_dim < 4:
                raise fields.error(f"dynamic scaling needs 4 dimensions that rotate, not {rotary_dim}", "head_dim")
            factor = table.number("factor")
            return RopeSpec(theta, rotary_dim, "dynamic", factor=factor, original_max_position=max_position)
        case "linear":
            return RopeSpec(theta, rotary_dim, "linear", factor=table.number("factor"))
        case "llama3":
            return _read_llama3(table, plain, original)
        case "yarn":
            return _read_yarn(table, plain, original, max_position)
        case "longrope":
            return _read_longrope(table, plain, original, max_position)
    known = "default, dynamic, linear, llama3, yarn, longrope"
    raise table.error(f"rope type {shown(kind)} is not supported", "rope_type", f"Supported: {known}.")


def _kind(table: ConfigReader) -> str:
    return table.text("rope_type", table.text("type", "default"))


def _read_llama3(table: ConfigReader, plain: RopeSpec, original: int) -> RopeSpec:
    low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
    if high <= low:
        raise table.error(f"'high_freq_factor' ({high}) must be above 'low_freq_factor' ({low})", "high_freq_factor")
    return RopeSpec(
        plain.theta,
        plain.rotary_dim,
        "llama3",
        factor=table.number("factor"),
        original_max_position=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _read_yarn(table: ConfigReader, plain: RopeSpec, original: int, max_position: int) -> RopeSpec:
    factor = table.number("factor", max_position / original)
    mscale, mscale_all_dim = table.optional_number("mscale"), table.optional_number("mscale_all_dim")
    attention_factor = _yarn_mscale(factor)
    if mscale and mscale_all_dim:
        attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    return RopeSpec(
        plain.theta,
        plain.rotary_dim,
        "yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=table.number("beta_fast", 32.0),
        beta_slow=table.number("beta_slow", 1.0),
        truncate=table.boolean("truncate", True),
        attention_factor=table.number("attention_factor", attention_factor),
    )


def _read_longrope(table: ConfigReader, plain: RopeSpec, original: int, max_position: int) -> RopeSpec:
    factor = table.number("factor", max_position / original)
    attention_factor = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeSpec(
        plain.theta,
        plain.rotary_dim,
        "longrope",
        factor=factor,
        original_max_position=original,
        attention_factor=table.number("attention_factor", attention_factor),
        short_factor=table.numbers("short_factor", plain.rotary_dim // 2),
        long_factor=table.numbers("long_factor", plain.rotary_dim // 2),
    )


def _original_length(fields: ConfigReader, table: ConfigReader, max_position: int) -> int:
    """The length trained before scaling: beside the table first (Phi-3), then in it, else the model's length."""
    name = "original_max_position_embeddings"
    if name in fields or fields.values.get("model_type") == "phi3":
        return fields.integer(name, 4096, low=2, high=MAX_POSITIONS)
    return table.integer(name, max_position, low=2, high=MAX_POSITIONS)


def _yarn_mscale(scale: float, mscale: float = 1.0) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def scaled_context(rope: RopeSpec, max_position: int) -> int:
    """The context of a model whose config.json says `max_position`, its scaling included.

    linear and dynamic stretch that length. yarn stretches the original length, which many leave in `max_position`. The
    configurations of llama3 and longrope say the stretched length, unless it is the original one.
    """
    match rope.scaling:
        case "linear" | "dynamic":
            return max(max_position, int(max_position * rope.factor))
        case "yarn":
            return max(max_position, int(rope.original_max_position * rope.factor))
        case "llama3" | "longrope" if max_position <= rope.original_max_position:
            return max(max_position, int(rope.original_max_position * rope.factor))
    return max_position


def rope_length(rope: RopeSpec | None, num_prompt_tokens: int, num_tokens: int) -> int:
    """The length by which a sequence's keys are rotated at least; 0: each by the position that it has.

    As transformers does it. longrope: a sequence of more tokens than the original length is rotated by the long factors
    from its first token on, so that its keys are computed again where it grows beyond. dynamic: a prompt is rotated by
    its own length, tokens behind it by theirs.
    Sequences of equal lengths in this sense share the keys of equal tokens, others do not.
    """
    if rope is None or rope.scaling not in ("dynamic", "longrope"):
        return 0
    if rope.scaling == "longrope":
        return rope.original_max_position + 1 if num_tokens > rope.original_max_position else 0
    return num_prompt_tokens if num_prompt_tokens > rope.original_max_position else 0


def rotary_rows(rope: RopeSpec, max_positions: int) -> int:
    """Rows of the tables of cos and sin for positions below `max_positions`: longrope has two, dynamic none."""
    if rope.scaling == "dynamic":
        return 0
    both = rope.scaling == "longrope" and max_positions > rope.original_max_position
    return max_positions + (rope.original_max_position if both else 0)


def rope_frequencies(rope: RopeSpec, length: int = 0) -> list[float]:
    """Radians per position of each rotating pair: rotary_dim / 2 values, the fastest first.

    `length`: tokens of the sequence, on which dynamic and longrope depend. Multiply cos and sin by
    `rope.attention_factor`.
    """
    theta = rope.theta
    if rope.scaling == "dynamic":
        stretch = max(length, rope.original_max_position) / rope.original_max_position
        theta *= (rope.factor * stretch - (rope.factor - 1)) ** (rope.rotary_dim / (rope.rotary_dim - 2))
    plain = [theta ** (-i / rope.rotary_dim) for i in range(0, rope.rotary_dim, 2)]
    match rope.scaling:
        case "linear":
            return [f / rope.factor for f in plain]
        case "llama3":
            return [_llama3_frequency(rope, f) for f in plain]
        case "yarn":
            return _yarn_frequencies(rope, plain)
        case "longrope":
            factors = rope.long_factor if length > rope.original_max_position else rope.short_factor
            return [f / s for f, s in zip(plain, factors, strict=True)]
    return plain


def _llama3_frequency(rope: RopeSpec, frequency: float) -> float:
    """Short waves stay, long waves are stretched by `factor`, those between are interpolated."""
    turns = rope.original_max_position * frequency / (2 * math.pi)  # of this pair over the original length
    if turns > rope.high_freq_factor:
        return frequency
    if turns < rope.low_freq_factor:
        return frequency / rope.factor
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - smooth) * frequency / rope.factor + smooth * frequency


def _yarn_frequencies(rope: RopeSpec, plain: list[float]) -> list[float]:
    """A ramp over the pairs: those that turn often stay, those that turn rarely are stretched by `factor`."""

    def pair_with_turns(turns: float) -> float:
        length = rope.original_max_position / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001  # as transformers: no division by zero
    ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(plain))]
    return [f / rope.factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)]
