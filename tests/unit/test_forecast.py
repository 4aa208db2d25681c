"""Whether to split: the forecast follows the floors, and says which of them decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.perfmodel import (
    DeviceSpeed,
    ModelShape,
    Setting,
    forecast,
    single_step_s,
    staggered_gain,
    staggered_halves_s,
    staggered_step_s,
    staggered_tax,
)

MODEL = ModelShape(weight_bytes=270e6, element_bytes=2, layers=30, hidden_size=576, query_group=3)
MACHINE = DeviceSpeed(flops_per_s=500e9, bandwidth_bytes_per_s=26e9, memory_bytes=24e9)
NEAR = Setting(MACHINE, round_trip_s=40e-6, lane_bytes_per_s=2e9, is_one_machine=False)


def test_a_cache_that_does_not_fit_is_split() -> None:
    """Whatever it costs: the context is larger than what is left beside the weights."""
    told = forecast(MODEL, 1, 10**7, NEAR)
    assert told.should_split
    assert "holds 0" in told.verdict


def test_a_slow_way_is_the_reason_not_to() -> None:
    """With half a millisecond a layer the lanes decide, and the verdict names them."""
    told = forecast(MODEL, 1, 128, replace(NEAR, round_trip_s=5e-4))
    assert not told.should_split
    assert told.bottleneck == "lanes"
    assert "lanes" in told.verdict


def test_halves_of_one_machine_are_slower_than_all_of_it() -> None:
    """Two halves of one memory cannot read faster than the whole: never split without need."""
    told = forecast(MODEL, 8, 4096, replace(NEAR, is_one_machine=True))
    assert not told.should_split
    assert told.split_tokens_per_s < told.monolithic_tokens_per_s


@given(st.integers(1, 64), st.integers(1, 50_000), st.floats(1e-6, 1e-2), st.floats(1e6, 1e11), st.booleans())
def test_a_better_way_never_makes_a_split_slower(
    batch: int, context: int, round_trip_s: float, lane_bytes_per_s: float, one: bool
) -> None:
    """Tokens per second of a split grow, or stay, with a shorter round trip and a wider way."""
    worse = Setting(MACHINE, round_trip_s, lane_bytes_per_s, one)
    better = Setting(MACHINE, round_trip_s / 2, lane_bytes_per_s * 2, one)
    slow, fast = forecast(MODEL, batch, context, worse), forecast(MODEL, batch, context, better)
    assert fast.split_tokens_per_s >= slow.split_tokens_per_s * (1 - 1e-9)
    assert fast.monolithic_tokens_per_s == slow.monolithic_tokens_per_s


@given(st.floats(1e-4, 1), st.floats(0, 1), st.floats(1e-4, 1), st.floats(0, 1))
def test_staggering_hides_what_is_shorter(
    dense_s: float, head_share: float, attention_s: float, lane_s: float
) -> None:
    """A staggered step takes at least as long as the busier side, or as attention and a head that hides none
    of it, and at most as long as no overlap.
    """
    head_s = head_share * dense_s
    staggered = staggered_halves_s(dense_s, head_s, attention_s, lane_s)
    assert staggered >= max(dense_s, attention_s + head_s) * (1 - 1e-9)
    assert staggered <= single_step_s(dense_s, attention_s, lane_s) * (1 + 1e-9)
    tax = staggered_tax(dense_s, head_s, attention_s, lane_s, monolithic_s=0.1)
    assert tax * staggered_gain(dense_s, head_s, attention_s, lane_s, monolithic_s=0.1) == pytest.approx(1)
    halves = (dense_s / 2, dense_s / 2, attention_s / 2, attention_s / 2, lane_s)
    assert staggered_halves_s(dense_s, 0.0, attention_s, lane_s) == staggered_step_s(*halves)
