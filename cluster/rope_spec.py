"""Which rotary position embedding a model was trained with, as a value.

The frequencies themselves are computed in `workers.dense.rope`; here is only what config.json says, in
either of its two spellings: `rope_theta` with `rope_scaling` (transformers 4 and older) or
`rope_parameters` (transformers 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cluster.config_reader import ConfigReader
from cluster.errors import UnsupportedModel


class RopeKind(StrEnum):
    """The scalings implemented."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """A rotary embedding; fields a kind does not use keep their defaults.

    Sources: RoPE arXiv 2104.09864; linear (position interpolation) arXiv 2306.15595; dynamic NTK only
    within the original length, where it equals the default; llama3 as published with Llama 3.1; YaRN
    arXiv 2309.00071.
    """

    kind: RopeKind = RopeKind.DEFAULT
    theta: float = 10_000.0
    factor: float = 1.0
    original_length: int = 0
    """Context length of the training before scaling; 0 where unscaled."""
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """YaRN: multiplies cos and sin; None derives it from `factor` and the two mscales."""
    mscale: float | None = None
    mscale_all_dimensions: float | None = None
    truncate: bool = True
    """YaRN: whether the bounds of the ramp are rounded outwards to whole dimensions."""


def read_rope(config: ConfigReader, default_theta: float, context_length: int) -> RopeSpec:
    """The rope of a config.json; raises `UnsupportedModel` or `BrokenModelFolder`."""
    parameters = config.nested("rope_parameters")
    if not parameters.values:
        parameters = config.nested("rope_scaling")
    kind = _read_kind(config, parameters)
    theta = parameters.number("rope_theta", config.number("rope_theta", default_theta))
    if kind is RopeKind.DEFAULT:
        return RopeSpec(theta=theta)
    if kind is RopeKind.LINEAR:
        return RopeSpec(kind, theta, parameters.number("factor"))
    original = config.integer_or_none("original_max_position_embeddings")
    if original is None or kind is RopeKind.DYNAMIC:
        original = parameters.integer("original_max_position_embeddings", context_length)
    if kind is RopeKind.DYNAMIC:
        # transformers scales from max_position_embeddings on, whatever the original length says.
        return RopeSpec(kind, theta, parameters.number("factor"), min(original, context_length))
    if kind is RopeKind.LLAMA3:
        return _read_llama3(parameters, theta, original)
    return _read_yarn(parameters, theta, original, context_length)


def _read_kind(config: ConfigReader, parameters: ConfigReader) -> RopeKind:
    """The kind named by `rope_type`, or `type` in folders older still."""
    name = parameters.text("rope_type", parameters.text("type", "default"))
    if any(isinstance(value, dict) for value in parameters.values.values()):
        raise UnsupportedModel(
            f"{config.path}: rotary embeddings that differ by layer type are not supported"
        )
    rotated = parameters.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if rotated != 1.0:
        raise UnsupportedModel(f"{config.path}: partial_rotary_factor {rotated:g} is not supported, only 1")
    if name not in set(RopeKind):
        raise UnsupportedModel(
            f"{config.path}: rope type {name!r} is not supported, only {', '.join(RopeKind)}"
        )
    return RopeKind(name)


def _read_llama3(parameters: ConfigReader, theta: float, original: int) -> RopeSpec:
    """Llama 3.1's scaling by bands of wavelength."""
    low = parameters.number("low_freq_factor")
    high = parameters.number("high_freq_factor")
    if high <= low:
        raise parameters.broken("high_freq_factor", f"must be above low_freq_factor {low:g}")
    return RopeSpec(
        RopeKind.LLAMA3,
        theta,
        parameters.number("factor"),
        original,
        low_frequency_factor=low,
        high_frequency_factor=high,
    )


def _read_yarn(parameters: ConfigReader, theta: float, original: int, context_length: int) -> RopeSpec:
    """YaRN; a missing factor is the ratio of the two lengths."""
    return RopeSpec(
        RopeKind.YARN,
        theta,
        parameters.number("factor", context_length / original),
        original,
        beta_fast=parameters.number("beta_fast", 32.0),
        beta_slow=parameters.number("beta_slow", 1.0),
        attention_factor=parameters.number_or_none("attention_factor"),
        mscale=_nonzero(parameters, "mscale"),
        mscale_all_dimensions=_nonzero(parameters, "mscale_all_dim"),
        truncate=parameters.boolean("truncate", True),
    )


def _nonzero(parameters: ConfigReader, key: str) -> float | None:
    """A positive number; 0 counts as absent, as in transformers."""
    return None if parameters.values.get(key) == 0 else parameters.number_or_none(key)
