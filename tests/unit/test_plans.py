"""Plan differences: what is decoded is what was encoded, whatever the history."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequest, LaneBroken, NeedFull
from cluster.types import Generation, ShardId
from workers.lanes.messages import PlanRow, StepPlanDifference
from workers.lanes.plan_bytes import pack_plan, unpack_plan
from workers.lanes.plans import MICRO_BATCHES_MOST, PlanDecoder, PlanEncoder, advance


def row(shard: int, start: int = 10, count: int = 1, tail: bool = True, generation: int = 1) -> PlanRow:
    """A row that attends all before it; a tail appends ids derived from its positions."""
    ids = tuple(start + offset for offset in range(count)) if tail else ()
    return PlanRow(ShardId(shard), Generation(generation), start, count, 0, start if tail else 5, ids)


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[int, tuple[PlanRow, ...], bool]]:
    """Plans of several micro-batches, each like the last one or not, with losses in between."""
    plans: list[tuple[int, tuple[PlanRow, ...], bool]] = []
    last: dict[int, tuple[PlanRow, ...]] = {}
    for _ in range(draw(st.integers(1, 12))):
        micro_batch = draw(st.integers(0, 2))
        kept = draw(st.lists(st.booleans(), min_size=4, max_size=4))
        rows = [_moved(draw, old) for old, keep in zip(last.get(micro_batch, ()), kept, strict=False) if keep]
        known = {old.shard for old in rows}
        fresh = draw(st.lists(st.integers(0, 9), unique=True, max_size=4))
        rows += [
            row(shard, draw(st.integers(5, 50)), draw(st.integers(1, 4)), draw(st.booleans()))
            for shard in fresh
            if ShardId(shard) not in known
        ]
        if draw(st.integers(0, 5)) == 0:
            rows.reverse()
        last[micro_batch] = tuple(rows)
        plans.append((micro_batch, tuple(rows), draw(st.integers(0, 4)) == 0))
    return plans


def _moved(draw: st.DrawFn, old: PlanRow) -> PlanRow:
    kind = draw(st.sampled_from(["same", "advanced", "advanced", "changed"]))
    if kind == "same":
        return old
    if kind == "advanced":
        count = draw(st.integers(1, 3))
        return advance(old, tuple(range(count)) if old.token_ids else ())
    return row(old.shard, draw(st.integers(5, 60)), draw(st.integers(1, 4)), draw(st.booleans()))


@given(steps())
def test_any_sequence_of_plans_survives(plans: list[tuple[int, tuple[PlanRow, ...], bool]]) -> None:
    """decode(encode(rows)) == rows through the bytes, also where the receiver forgot and asked for all."""
    encoder, decoder = PlanEncoder(), PlanDecoder()
    for step, (micro_batch, rows, receiver_forgets) in enumerate(plans):
        if receiver_forgets:
            decoder = PlanDecoder()
        difference = unpack_plan(memoryview(pack_plan(encoder.encode(step, micro_batch, rows))))
        try:
            decoded = decoder.decode(micro_batch, difference)
        except NeedFull:
            assert difference.base_step is not None
            encoder.forget(micro_batch)
            difference = unpack_plan(memoryview(pack_plan(encoder.encode(step, micro_batch, rows))))
            assert difference.base_step is None
            decoded = decoder.decode(micro_batch, difference)
        assert decoded == rows


def test_decoding_steps_are_small() -> None:
    """When every row moves on by one token, the difference names shards and tokens and no row whole."""
    encoder = PlanEncoder()
    rows = [row(shard) for shard in range(32)]
    encoder.encode(0, 0, rows)
    moved = [advance(old, (7,)) for old in rows]
    difference = encoder.encode(1, 0, moved)
    assert difference.changed == ()
    assert difference.removed == ()
    assert len(pack_plan(difference)) < len(pack_plan(StepPlanDifference(1, None, (), (), tuple(moved)))) / 2


def test_a_foreign_base_needs_a_full_plan() -> None:
    """Another step, another micro-batch or no history at all answers NeedFull, and keeps the base."""
    decoder = PlanDecoder()
    decoder.decode(0, StepPlanDifference(3, None, (), (), (row(1),)))
    difference = StepPlanDifference(5, 4, (), ((ShardId(1), (9,)),), ())
    for micro_batch in (0, 1):
        with pytest.raises(NeedFull):
            decoder.decode(micro_batch, difference)
    assert decoder.decode(0, StepPlanDifference(4, 3, (), ((ShardId(1), (9,)),), ()))[0].start == 11


@pytest.mark.parametrize(
    "difference",
    [
        StepPlanDifference(1, 0, (ShardId(7),), (), ()),
        StepPlanDifference(1, 0, (), ((ShardId(7), (1,)),), ()),
        StepPlanDifference(1, 0, (ShardId(1),), ((ShardId(1), (1,)),), ()),
        StepPlanDifference(1, 0, (ShardId(1),), (), (row(1),)),
        StepPlanDifference(1, None, (), (), (row(4), row(4))),
        StepPlanDifference(1, 0, (), ((ShardId(1), ()),), ()),
        StepPlanDifference(1, 0, (), ((ShardId(2), (1,)),), ()),
    ],
)
def test_a_difference_that_does_not_fit_its_base_is_refused(difference: StepPlanDifference) -> None:
    """Unknown or twice-named shards, tails without tokens and others with some; the base stays."""
    decoder = PlanDecoder()
    base = (row(1), row(2, tail=False))
    decoder.decode(0, StepPlanDifference(0, None, (), (), base))
    with pytest.raises(InvalidRequest):
        decoder.decode(0, difference)
    assert decoder.decode(0, StepPlanDifference(1, 0, (), (), ())) == base


def test_micro_batches_are_bounded() -> None:
    """A micro-batch beyond the limit is refused, not remembered."""
    with pytest.raises(InvalidRequest):
        PlanDecoder().decode(MICRO_BATCHES_MOST, StepPlanDifference(0, None, (), (), ()))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_plan_are_refused(data: bytes) -> None:
    """Arbitrary bytes give a plan that packs to the same bytes, or LaneBroken."""
    try:
        plan = unpack_plan(memoryview(data))
    except LaneBroken:
        return
    repacked = pack_plan(plan)
    # The pad field of the head is free; all else is determined.
    assert repacked[:28] == data[:28]
    assert repacked[32:] == data[32:]


def test_numbers_that_do_not_fit_are_refused_by_the_sender() -> None:
    """A token id or a position beyond its field raises before anything is sent."""
    with pytest.raises(InvalidRequest):
        pack_plan(StepPlanDifference(0, None, (), (), (row(1, start=2**32),)))
    with pytest.raises(InvalidRequest):
        pack_plan(StepPlanDifference(0, 1, (), ((ShardId(1), (2**32,)),), ()))
