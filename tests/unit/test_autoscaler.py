"""How many workers there should be: by hand for single rules, and over a load that was recorded."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policies.autoscaler import AutoscalerPolicy, Bounds, Change, Sample, Scaled, decide

POLICY = AutoscalerPolicy(out_after_s=30, in_after_s=300, cool_down_s=120)
BOUNDS: Mapping[Scaled, Bounds] = {"attention": Bounds(1, 8), "dense": Bounds(1, 4)}
RECORDED = Path(__file__).with_name("recorded_load.csv")


def _steady(
    span_s: float, pool_share: float = 0.5, waiting: int = 0, busy_share: float | None = 0.5
) -> list[Sample]:
    return [Sample(10.0 * i, pool_share, waiting, busy_share) for i in range(int(span_s / 10) + 1)]


def _decide(
    samples: Sequence[Sample],
    attention: int = 2,
    dense: int = 2,
    changed_s: Mapping[Scaled, float] | None = None,
) -> dict[Scaled, int]:
    counts: Mapping[Scaled, int] = {"attention": attention, "dense": dense}
    changes = decide(samples, counts, BOUNDS, changed_s or {}, POLICY)
    assert all(change.reason for change in changes)
    return {change.role: change.count for change in changes}


def test_a_full_pool_grows_by_what_it_lacks() -> None:
    """By as many workers as bring the share in use back to what is aimed at; not before it was full for long,
    and not beyond the bounds.
    """
    assert _decide(_steady(20, pool_share=0.9)) == {}
    assert _decide(_steady(30, pool_share=0.9)) == {"attention": 3}
    assert _decide(_steady(30, pool_share=1.0), attention=6) == {"attention": 8}
    assert _decide(_steady(30, pool_share=1.0), attention=8) == {}
    assert _decide([*_steady(30, pool_share=0.9), Sample(40, 0.7, 0, 0.5)]) == {}


def test_who_waits_gets_what_it_waits_for() -> None:
    """Room where the pool is full, a dense worker where it is not; busy ones get company without a queue."""
    assert _decide(_steady(30, pool_share=0.95, waiting=5)) == {"attention": 3}
    assert _decide(_steady(30, waiting=5)) == {"dense": 3}
    assert _decide(_steady(30, busy_share=0.95)) == {"dense": 3}
    assert _decide(_steady(30, busy_share=None)) == {}


def test_a_worker_leaves_when_those_who_stay_are_at_ease_without_it() -> None:
    """Its share is counted as theirs already; one at a time, after five minutes, and not the last one."""
    assert _decide(_steady(300, pool_share=0.2)) == {"attention": 1}
    assert _decide(_steady(300, pool_share=0.2), attention=8) == {"attention": 7}
    assert _decide(_steady(290, pool_share=0.2)) == {}
    assert _decide(_steady(300, pool_share=0.35)) == {}, "one alone would be 70 % full"
    assert _decide(_steady(300, pool_share=0.0), attention=1) == {}
    assert _decide(_steady(300, busy_share=0.1)) == {"dense": 1}
    assert _decide([*_steady(300, busy_share=0.1), Sample(310, 0.5, 1, 0.1)]) == {}


def test_nobody_leaves_while_another_does() -> None:
    """Its cache is on its way, so the pool does not yet say how full it will be."""
    samples = _steady(300, pool_share=0.1)
    leaving = [*samples[:-1], Sample(300, 0.1, 0, 0.5, leaving=True)]
    assert _decide(leaving) == {}


def test_after_a_change_a_role_is_left_alone() -> None:
    """For the cool-down, whatever the load; the other role is not held up."""
    samples = _steady(130, pool_share=0.9, busy_share=0.9)
    assert _decide(samples, changed_s={"attention": 20.0}) == {"dense": 3}
    assert _decide(samples, changed_s={"attention": 10.0}) == {"attention": 3, "dense": 3}


def test_the_bounds_hold_at_once() -> None:
    """Who is outside is brought inside by the first look, also within the cool-down."""
    one = _steady(0)
    assert _decide(one, attention=0, dense=9, changed_s={"dense": 0.0}) == {"attention": 1, "dense": 4}


@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 9), st.floats(0, 1) | st.none()), min_size=1, max_size=40
    ),
    st.integers(0, 12),
    st.integers(0, 12),
)
def test_whatever_is_reported_changes_stay_within_bounds(
    reported: list[tuple[float, int, float | None]], attention: int, dense: int
) -> None:
    """And workers leave one at a time, but for those beyond the bounds."""
    samples = [Sample(20.0 * i, *each) for i, each in enumerate(reported)]
    counts: Mapping[Scaled, int] = {"attention": attention, "dense": dense}
    for change in decide(samples, counts, BOUNDS, {}, POLICY):
        bounds = BOUNDS[change.role]
        assert bounds.least <= change.count <= bounds.most
        assert change.count != counts[change.role]
        assert change.count >= min(counts[change.role] - 1, bounds.most)


def _replayed(policy: AutoscalerPolicy) -> list[tuple[float, Change]]:
    """Decisions over the recorded load. It is replayed as it was, so the pool does not become emptier by
    what is decided; each decision begins a new window, as in the autoscaler.
    """
    counts: dict[Scaled, int] = {"attention": 2, "dense": 1}
    changed_s: dict[Scaled, float] = {}
    window: list[Sample] = []
    found = []
    with RECORDED.open() as file:
        for row in csv.DictReader(file):
            busy = float(row["busy_share"]) if row["busy_share"] else None
            window.append(Sample(float(row["at_s"]), float(row["pool_share"]), int(row["waiting"]), busy))
            for change in decide(window, counts, BOUNDS, changed_s, policy)[:1]:
                found.append((window[-1].at_s, change))
                counts[change.role], changed_s[change.role] = change.count, window[-1].at_s
                window = []
    return found


def test_over_a_recorded_load_workers_come_with_it_and_leave_after_it() -> None:
    """The record (`python -m tests.record_load`) is of a cluster under one stream, sixteen, one, none: dense
    workers are added in the second part, leave in the last one, and nothing goes to and fro.
    """
    found = _replayed(AutoscalerPolicy(out_after_s=5, in_after_s=15, cool_down_s=5))
    begin_s, end_s = BUSY_S
    dense = [(at_s, change.count) for at_s, change in found if change.role == "dense"]
    assert [count for at_s, count in dense if begin_s <= at_s <= end_s] == [2, 3, 4]
    assert [count for at_s, count in dense if at_s > end_s] == [3, 2]
    for role in BOUNDS:
        counts = [change.count for _, change in found if change.role == role]
        peak = counts.index(max(counts)) if counts else 0
        assert counts[:peak] == sorted(counts[:peak])
        assert counts[peak:] == sorted(counts[peak:], reverse=True)


BUSY_S = (20.0, 60.0)
"""When the recorded load was high."""


def test_an_autoscaler_with_patience_ignores_a_short_load() -> None:
    """With windows longer than the record nothing changes."""
    assert _replayed(AutoscalerPolicy(out_after_s=600, in_after_s=600)) == []


@pytest.mark.parametrize("role", BOUNDS)
def test_nothing_is_decided_without_a_look(role: Scaled) -> None:
    """No samples, no change."""
    assert decide([], {role: 0}, BOUNDS, {}, POLICY) == ()
