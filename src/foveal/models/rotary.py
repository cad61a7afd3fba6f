"""Rotary settings in config.json: both dialects read, the older one written.

transformers 4 writes `rope_theta`, `rope_scaling` and `partial_rotary_factor` beside each other;
transformers 5 writes one `rope_parameters` (for Gemma 3, one for each type of layer), and reads
both. An unknown type, or a key that no type has, is a `ConfigError`.
"""

import math

from foveal.core.errors import ConfigError
from foveal.models.fields import Fields
from foveal.nn.rope import RopeConfig
from foveal.nn.scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    NoScaling,
    Scaling,
    YarnScaling,
)

_KEYS = frozenset(
    {"type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "finetuned"}
    | {"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
    | {"short_factor", "long_factor", "low_freq_factor", "high_freq_factor"}
    | {"mscale", "mscale_all_dim", "truncate"}
)
"""Keys of some type; each type ignores those of the others, as the reference does."""

_TYPES = {name: name for name in ("default", "linear", "dynamic", "yarn", "llama3", "longrope")}


def read_rope(
    fields: Fields,
    *,
    head_dim: int,
    max_positions: int,
    default_theta: float = 10_000.0,
    original: int | None = None,
    types: dict[str, str] = _TYPES,
) -> RopeConfig:
    """The rotary configuration of a flat config.json.

    `original` is the length before extension where the family keeps it elsewhere (Phi-3); `types`
    maps the words that the family accepts to the types of scaling.
    """
    older, newer = fields.inner("rope_scaling"), fields.inner("rope_parameters")
    inner = older or newer or Fields({})
    theta = fields.number("rope_theta", default_theta)
    partial = fields.number("partial_rotary_factor", 1.0)
    return rope_from(
        inner,
        theta=theta,
        dim=int(head_dim * inner.number("partial_rotary_factor", partial)),
        max_positions=max_positions,
        original=original,
        types=types,
    )


def rope_from(
    inner: Fields,
    *,
    theta: float,
    dim: int,
    max_positions: int,
    original: int | None = None,
    types: dict[str, str] = _TYPES,
) -> RopeConfig:
    """The rotary configuration of one `rope_scaling` or `rope_parameters` object.

    `theta` applies where the object has none of its own.
    """
    inner.only_keys(_KEYS)
    theta = inner.number("rope_theta", theta)
    word = "rope_type" if "rope_type" in inner else "type"
    kind = inner.choice(word, types, "default")
    if original is None:
        original = inner.integer("original_max_position_embeddings", max_positions)
    return RopeConfig(
        dim=dim, theta=theta, scaling=_scaling(kind, inner, dim, max_positions, original)
    )


def _scaling(kind: str, inner: Fields, dim: int, max_positions: int, original: int) -> Scaling:
    match kind:
        case "linear":
            return LinearScaling(factor=inner.number("factor"))
        case "dynamic":
            return DynamicScaling(factor=inner.number("factor"), original_length=max_positions)
        case "llama3":
            return Llama3Scaling(
                factor=inner.number("factor"),
                low_freq_factor=inner.number("low_freq_factor"),
                high_freq_factor=inner.number("high_freq_factor"),
                original_length=original,
            )
        case "yarn":
            factor = inner.number("factor", max_positions / original)
            return YarnScaling(
                factor=factor,
                original_length=original,
                attention_factor=_yarn_attention_factor(inner, factor),
                beta_fast=inner.number("beta_fast", 32.0),
                beta_slow=inner.number("beta_slow", 1.0),
                truncate=inner.flag("truncate", True),
            )
        case "longrope":
            ratio = inner.number("factor", max_positions / original)
            grown = math.sqrt(1 + math.log(max(ratio, 1.0)) / math.log(original))
            return LongScaling(
                short_factor=inner.numbers("short_factor", dim // 2),
                long_factor=inner.numbers("long_factor", dim // 2),
                original_length=original,
                attention_factor=inner.number("attention_factor", grown),
            )
    return NoScaling()


def _yarn_attention_factor(inner: Fields, factor: float) -> float:
    """0.1 ln(factor) + 1 (YaRN, section 3.4), or the ratio of two such (DeepSeek)."""

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(max(factor, 1.0)) + 1.0

    given, mscale, mscale_all = (
        inner.optional_number(name) for name in ("attention_factor", "mscale", "mscale_all_dim")
    )
    if given is not None:
        return given
    return grown(mscale) / grown(mscale_all) if mscale and mscale_all else grown(1.0)


def write_rope(rope: RopeConfig | None, head_dim: int) -> dict[str, object]:
    """`rope_theta`, `rope_scaling` and, where not the whole head turns, `partial_rotary_factor`."""
    if rope is None:
        raise ConfigError("rope: got None; accepted: rotary positions, in this family")
    fields: dict[str, object] = {"rope_theta": rope.theta, "rope_scaling": _write(rope.scaling)}
    if rope.dim != head_dim:
        fields["partial_rotary_factor"] = rope.dim / head_dim
    return fields


def _write(scaling: Scaling) -> dict[str, object] | None:
    match scaling:
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case DynamicScaling():
            return {"rope_type": "dynamic", "factor": scaling.factor}
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
        case YarnScaling():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "attention_factor": scaling.attention_factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
            }
        case LongScaling():
            return {
                "rope_type": "longrope",
                "short_factor": list(scaling.short_factor),
                "long_factor": list(scaling.long_factor),
                "original_max_position_embeddings": scaling.original_length,
                "attention_factor": scaling.attention_factor,
            }
    return None
