"""Rotary position embedding: frequencies per kind of scaling, tables on demand, the rotation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cluster.rope_spec import RopeKind, RopeSpec


class RotaryEmbedding:
    """Turns positions into cos and sin tables; owns the frequencies of one model on one device.

    Frequencies and angles are float32 whatever the model's dtype, like transformers': bfloat16 cannot
    count past 256. Angles pair dimension i with i + head_size/2 ("rotate half").
    """

    def __init__(self, spec: RopeSpec, head_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.frequencies = inverse_frequencies(spec, head_size).to(device)  # [head_size / 2] float32
        self._scale = attention_scale(spec)
        self._dtype = dtype

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [rows, 1, head_size / 2] in model dtype, for `positions` [rows]."""
        angles = (positions.to(torch.float32).unsqueeze(-1) * self.frequencies).unsqueeze(1)
        return (angles.cos() * self._scale).to(self._dtype), (angles.sin() * self._scale).to(self._dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`heads` [rows, heads, head_size] rotated by tables [rows, 1, head_size / 2], as a new tensor."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def inverse_frequencies(spec: RopeSpec, head_size: int) -> Tensor:
    """[head_size / 2] float32: the angle by which each pair of dimensions turns per position.

    Operations keep transformers' order, so that float32 results are the same bits.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    wavelengths = spec.theta**exponents
    plain = 1.0 / wavelengths
    match spec.kind:
        case RopeKind.DEFAULT | RopeKind.DYNAMIC:
            # Dynamic NTK equals the default within the original length, and ModelSpec ends there.
            return plain
        case RopeKind.LINEAR:
            return plain / spec.factor
        case RopeKind.LLAMA3:
            return _llama3(spec, plain)
        case RopeKind.YARN:
            return _yarn(spec, head_size, wavelengths)


def attention_scale(spec: RopeSpec) -> float:
    """Factor on cos and sin: YaRN's temperature (arXiv 2309.00071 equation 22), else 1."""
    if spec.kind is not RopeKind.YARN:
        return 1.0
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale is not None and spec.mscale_all_dimensions is not None:
        return _yarn_scale(spec.factor, spec.mscale) / _yarn_scale(spec.factor, spec.mscale_all_dimensions)
    return _yarn_scale(spec.factor, 1.0)


def _yarn_scale(factor: float, mscale: float) -> float:
    """0.1 m ln(s) + 1 for a real extension."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(spec: RopeSpec, plain: Tensor) -> Tensor:
    """Long waves are stretched by the factor, short ones kept, those between blended."""
    turns = spec.original_length / (2 * math.pi / plain)  # rotations within the original length
    blend = (turns - spec.low_frequency_factor) / (spec.high_frequency_factor - spec.low_frequency_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * plain / spec.factor + blend * plain


def _yarn(spec: RopeSpec, head_size: int, wavelengths: Tensor) -> Tensor:
    """A ramp over dimensions, from kept (turns more than beta_fast times) to stretched (beta_slow)."""
    low = _yarn_dimension(spec, head_size, spec.beta_fast)
    high = _yarn_dimension(spec, head_size, spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    if low == high:
        high += 0.001  # the ramp's slope stays finite
    ramp = (torch.arange(head_size // 2, dtype=torch.float32) - low) / (high - low)
    kept = 1 - ramp.clamp(0.0, 1.0)
    return 1.0 / (spec.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _yarn_dimension(spec: RopeSpec, head_size: int, rotations: float) -> float:
    """The (fractional) dimension that turns `rotations` times within the original length."""
    ratio = spec.original_length / (rotations * 2 * math.pi)
    return head_size * math.log(ratio) / (2 * math.log(spec.theta))
