"""Rotary embeddings: what must hold whatever the reference implementation does."""

from __future__ import annotations

import math

import pytest
import torch

from cluster.rope_spec import RopeKind, RopeSpec
from workers.dense.rope import RotaryEmbedding, attention_scale, inverse_frequencies, rotate

CPU = torch.device("cpu")
LLAMA3 = RopeSpec(RopeKind.LLAMA3, 5e5, 8.0, 8192, low_frequency_factor=1.0, high_frequency_factor=4.0)
YARN = RopeSpec(RopeKind.YARN, 1e4, 16.0, 4096)


def test_scores_depend_on_distance_only() -> None:
    """The point of RoPE: q at p and k at p - d score the same for every p."""
    rope = RotaryEmbedding(RopeSpec(), 16, torch.float32, CPU)
    query, key = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    at = [
        float(
            (
                rotate(query, *rope.tables(torch.tensor([p])))
                * rotate(key, *rope.tables(torch.tensor([p - 5])))
            ).sum()
        )
        for p in (5, 100, 1000)
    ]
    assert at == pytest.approx([at[0]] * 3, abs=1e-4)


def test_rotation_keeps_lengths_and_position_zero() -> None:
    """Rotating changes no norm, and nothing at all at position 0."""
    heads = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    rope = RotaryEmbedding(RopeSpec(), 8, torch.float32, CPU)
    rotated = rotate(heads, *rope.tables(torch.tensor([0, 7, 900])))
    torch.testing.assert_close(rotated.norm(dim=-1), heads.norm(dim=-1))
    assert torch.equal(rotated[0], heads[0])


def test_angles_are_float32_in_a_bfloat16_model() -> None:
    """Positions 4096 and 4097 differ, which bfloat16 cannot tell apart."""
    rope = RotaryEmbedding(RopeSpec(), 8, torch.bfloat16, CPU)
    cos, sin = rope.tables(torch.tensor([4096, 4097]))
    assert cos.dtype == sin.dtype == torch.bfloat16
    assert cos.shape == (2, 1, 4)
    assert float(cos[1, 0, 0]) == pytest.approx(math.cos(4097), abs=5e-3)


def test_default_frequencies_by_formula() -> None:
    """theta ** (-2 i / d)."""
    expected = [10_000.0 ** (-2 * i / 16) for i in range(8)]
    assert inverse_frequencies(RopeSpec(), 16).tolist() == pytest.approx(expected, rel=1e-6)


def test_linear_divides_and_dynamic_keeps_all_frequencies() -> None:
    """Position interpolation stretches every wave; dynamic NTK none within the original length."""
    plain = inverse_frequencies(RopeSpec(), 16)
    assert torch.equal(inverse_frequencies(RopeSpec(RopeKind.LINEAR, factor=4.0), 16), plain / 4)
    assert torch.equal(
        inverse_frequencies(RopeSpec(RopeKind.DYNAMIC, factor=2.0, original_length=64), 16), plain
    )


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    """Bands by wavelength: kept, blended monotonically, divided by the factor."""
    plain = inverse_frequencies(RopeSpec(theta=5e5), 128)
    ratio = plain / inverse_frequencies(LLAMA3, 128)
    wavelengths = 2 * math.pi / plain
    assert torch.equal(ratio[wavelengths < 8192 / 4], torch.ones(int((wavelengths < 8192 / 4).sum())))
    torch.testing.assert_close(ratio[wavelengths > 8192], torch.full_like(ratio[wavelengths > 8192], 8.0))
    assert (ratio.diff() >= -1e-5).all()


def test_yarn_keeps_short_waves_stretches_long_ones_and_scales() -> None:
    """First dimensions as trained, last divided by the factor; temperature 0.1 ln(s) + 1."""
    ratio = inverse_frequencies(RopeSpec(), 64) / inverse_frequencies(YARN, 64)
    assert float(ratio[0]) == pytest.approx(1.0)
    assert float(ratio[-1]) == pytest.approx(16.0)
    assert (ratio.diff() >= -1e-5).all()
    assert attention_scale(YARN) == pytest.approx(0.1 * math.log(16) + 1)


def test_yarn_scale_prefers_what_the_folder_says() -> None:
    """An explicit factor wins over the mscales, these over the formula; one mscale alone is ignored."""
    both = RopeSpec(RopeKind.YARN, 1e4, 16.0, 4096, mscale=2.0, mscale_all_dimensions=1.0)
    assert attention_scale(both) == pytest.approx((0.2 * math.log(16) + 1) / (0.1 * math.log(16) + 1))
    assert attention_scale(RopeSpec(RopeKind.YARN, 1e4, 16.0, 4096, attention_factor=1.5, mscale=2.0)) == 1.5
    assert attention_scale(RopeSpec(RopeKind.YARN, 1e4, 16.0, 4096, mscale=2.0)) == attention_scale(YARN)
    assert attention_scale(RopeSpec()) == 1.0


def test_yarn_with_bounds_that_coincide_is_finite() -> None:
    """A tiny original length puts both ends of the ramp on dimension 0."""
    frequencies = inverse_frequencies(RopeSpec(RopeKind.YARN, 1e4, 4.0, 2), 16)
    assert frequencies.isfinite().all()
