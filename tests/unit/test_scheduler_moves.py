"""What the scheduler does for shards that move: a frozen sequence costs nobody anything."""

from __future__ import annotations

from cluster.policies.scheduler import Scheduler, SchedulerLimits
from cluster.types import SequenceKey


def test_nobody_is_preempted_for_a_frozen_sequence() -> None:
    """It was refused at the end of its room, and then its shard begins to move: it could not use what others
    would give up.
    """
    limits = SchedulerLimits(8, 4, 8, reserve_ahead_tokens=2, max_sequence_length=64)
    scheduler = Scheduler(limits)
    first, second = SequenceKey("first"), SequenceKey("second")
    for key in (first, second):
        scheduler.submit(key, 2, 0, 1e9, 0.0, max_length=32)
    now_s = 0.0
    for _ in range(4):
        plan = scheduler.plan(now_s)
        for request in plan.room:
            assert scheduler.granted(request, [(0, min(4, request.end))] if request.first == 0 else [(0, 4)])
        scheduler.apply(plan, {row.key: 1 for row in plan.rows if row.samples})
    plan = scheduler.plan(now_s)
    for request in plan.room:
        scheduler.refused(request, now_s)
    scheduler.freeze(first)
    preempted: list[SequenceKey] = []
    for _ in range(3):
        now_s += 0.1
        plan = scheduler.plan(now_s)
        preempted += plan.preempted
        for request in plan.room:
            scheduler.refused(request, now_s)
    assert preempted == []


def test_a_frozen_sequence_that_waits_does_not_begin_to_run() -> None:
    """It has no room, and asks for none while its shard moves: it stays in the queue until it may go on."""
    scheduler = Scheduler(SchedulerLimits(8, 4, 8, reserve_ahead_tokens=2, max_sequence_length=64))
    key = SequenceKey("first")
    scheduler.submit(key, 2, 0, 1e9, 0.0, max_length=32)
    scheduler.freeze(key)
    assert scheduler.plan(0.0).room == ()
    assert (scheduler.running, scheduler.waiting) == (0, 1)
    scheduler.thaw(key)
    (wanted,) = scheduler.plan(0.0).room
    assert wanted.key == key


def test_what_survived_a_loss_counts_as_computed() -> None:
    """Behind a hole KV is there as far as it survived; within the hole there is none."""
    scheduler = Scheduler(SchedulerLimits(8, 4, 8, reserve_ahead_tokens=2, max_sequence_length=64))
    key = SequenceKey("first")
    shards = [(0, 8), (8, 16), (16, 24)]
    scheduler.submit(key, 20, 0, 1e9, 0.0, max_length=32, room=shards, computed=[(0, 19)])
    scheduler.lost(key, [(0, 8)])
    assert [scheduler.computed_of(key, shard) for shard in shards] == [0, 16, 19]
