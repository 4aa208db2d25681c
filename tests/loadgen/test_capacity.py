"""Steady states in closed form."""

from __future__ import annotations

from itertools import pairwise

import pytest

from cluster import hardware
from loadgen.metrics import Objectives
from loadgen.simulation import models
from loadgen.simulation.capacity import Setting, Traffic, at_batch, best_within
from loadgen.simulation.validation import PER_DOLLAR, TRACES, computed_checks, per_dollar_over_catalogue
from tests.loadgen.simulated import shape


def test_a_small_batch_waits_for_its_lanes_too() -> None:
    """Four rows over 16 attention workers are less than a query each; a step still takes the weights' time
    and 80 round trips of 33 us, more rows take longer, and no batch keeps less.
    """
    where = shape("h100x8", "h20x16")
    setting = Setting(models.resolve("llama3-70b"), Traffic.of_means(*TRACES["azure-conv"]))
    steps_s = [at_batch(where, setting, batch).step_s for batch in range(1, 9)]
    least_s = 137.5e9 / (8 * 3.35e12) + 80 * 33e-6
    assert least_s < steps_s[0]
    assert all(before < after for before, after in pairwise(steps_s))
    assert best_within(where, setting, Objectives((("tpot", 1000 * least_s),))) is None


def test_a_first_token_waits_for_what_is_asked_before_it() -> None:
    """A step for the directory where there are attention workers, one for room everywhere."""
    setting = Setting(models.resolve("llama3-70b"), Traffic.of_means(512, 128))
    for attention, waited in ((None, 1.5), ("h20x4", 2.5)):
        found = at_batch(shape("h100x4", attention), setting, 8)
        assert found.ttft_s - 2 * setting.efficiencies.call_s == pytest.approx((waited + 1) * found.step_s)


def test_a_published_range_is_sought_over_the_whole_catalogue() -> None:
    """Every kind that has a network is tried on both sides; the row names what comes nearest to each end."""
    found = per_dollar_over_catalogue()
    kinds = {kind.name for kind in hardware.built_in().values() if kind.network_bytes_per_s is not None}
    for place in (0, 1):
        sides = {where.rpartition(", ")[2].split(" + ")[place].rpartition("x")[0] for _, where in found}
        assert sides == kinds
    (row,) = (check for check in computed_checks() if "first version" in check.claim)
    for end in PER_DOLLAR:
        ratio, where = min(found, key=lambda pair: abs(pair[0] / end - 1))
        assert f"{ratio:.2f} x ({where})" in row.because
