"""Moves at step boundaries: when the next piece is pulled, what may begin, and what does not count."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest

from cluster.clock import ManualClock
from cluster.errors import AnabranchError
from cluster.policies.scheduler import Scheduler, SchedulerLimits
from cluster.types import Epoch, Generation, SequenceKey, ShardId, ShardRef, WorkerId
from tests.attention_builders import build_geometry
from tests.cluster_harness import Listener, request
from workers.dense.deltas import Outbox
from workers.dense.members import AttentionMember, MemberTable
from workers.dense.metrics import DenseMetrics
from workers.dense.mover import Mover
from workers.dense.rooms import PullWanted
from workers.dense.sequence_table import SequenceTable, TableLimits
from workers.dense.sequences import LiveSequence, Placed
from workers.dense.submissions import Door

EPOCH = Epoch(1)
OLD, NEW = WorkerId("old"), WorkerId("new")
BLOCK = 4
LENGTH = 33
Answer = Callable[[Placed | AnabranchError | None], None]


class FakePool:
    """Two attention workers, and the pulls that were asked for: a test answers them."""

    def __init__(self) -> None:
        self.members = MemberTable()
        self.pulls: list[tuple[PullWanted, Answer]] = []
        self.tell(is_admitting=True)
        for member in self.members.due(0.0, 1.0):
            self.members.connected(member, cast(Any, object()))

    def tell(self, *, is_admitting: bool) -> None:
        """What membership says; the old worker takes new shards or drains."""
        self.members.update(
            AttentionMember(worker, EPOCH, "host:1", 999, 999, is_admitting=is_admitting or worker == NEW)
            for worker in (OLD, NEW)
        )

    def pull(self, wanted: PullWanted, answer: Answer) -> None:
        """See `Pool.pull`."""
        self.pulls.append((wanted, answer))

    def trim(self, key: SequenceKey, workers: Iterable[WorkerId], keep_from: int) -> None:
        """See `Pool.trim`."""


class Moving:
    """A mover over sequences of `LENGTH` tokens that lie at `OLD`, all computed but the last."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.pool = FakePool()
        self.scheduler = Scheduler(SchedulerLimits(99, 99, 99, 4, max_sequence_length=999))
        pool, outbox = cast(Any, self.pool), Outbox()
        self.table = SequenceTable(TableLimits(9, 9.0), self.scheduler, pool, outbox, self.clock)
        self.door = Door(
            DenseMetrics("model"),
            self.table,
            self.scheduler,
            pool,
            outbox,
            self.clock,
            lambda call: call(),
            lambda _worker, _epoch: True,
            build_geometry(block_tokens=BLOCK),
        )
        self.mover = Mover(self.door, piece_tokens=8, shards_most=3)

    def add(self, *ends: int) -> LiveSequence:
        """A sequence that has shards up to these positions, and runs."""
        submission = request(range(LENGTH), 100)
        sequence = LiveSequence.of(submission, Listener(), 0.0, self.door.geometry)
        firsts = (0, *ends)
        shards = [placed(OLD, first, end) for first, end in zip(firsts, ends, strict=False)]
        self.table.admit(sequence)
        self.scheduler.submit(
            sequence.key,
            LENGTH,
            0,
            1e9,
            0.0,
            max_length=sequence.max_length,
            room=[(item.shard.first, item.shard.end) for item in shards],
            computed=[(0, LENGTH - 1)],
        )
        sequence.place(shards)
        return sequence

    def step(self) -> None:
        """A step of all that may run."""
        plan = self.scheduler.plan(self.clock())
        self.scheduler.apply(plan, {row.key: 1 for row in plan.rows if row.samples})

    def tick(self) -> int:
        """What an engine does between two steps; how many pulls there were by then."""
        self.mover.tick()
        return len(self.pool.pulls)

    def answer(self, end: int | None) -> None:
        """The last pull brought a copy up to a position, or nothing."""
        wanted, answer = self.pool.pulls[-1]
        answer(None if end is None else placed(wanted.target[0], 0, end))


def placed(worker: WorkerId, first: int, end: int) -> Placed:
    """A shard; its id is its first position."""
    return Placed(ShardRef(worker, EPOCH, ShardId(first), first, end), Generation(1 << 16))


@pytest.mark.parametrize("brings", [None, 8], ids=["nothing", "no more than before"])
@pytest.mark.parametrize("goes_on", ["with a step", "after a pause"])
def test_a_piece_in_vain_is_not_pulled_again_at_once(brings: int | None, goes_on: str) -> None:
    """A pull brought nothing, since the source is not certain of it: the next one waits for a step of the
    sequence, or a moment where there is none.
    """
    moving = Moving()
    sequence = moving.add(60)
    moving.mover.start(sequence.key, OLD, NEW)
    assert moving.tick() == 1
    moving.answer(8)
    assert moving.tick() == 2
    moving.answer(brings)
    assert [moving.tick() for _ in range(5)] == [2] * 5
    if goes_on == "with a step":
        moving.step()
    else:
        moving.clock.advance(0.6)
    assert moving.tick() == 3
    moving.answer(16)
    assert moving.tick() == 4


def test_a_sequence_in_many_shards_is_not_split_further() -> None:
    """Each part that moves adds a shard; a sequence needs those that are left to grow. Whole shards move."""
    for ends, pulls in (((24, 60), 1), ((24, 28, 60), 0)):
        moving = Moving()
        sequence = moving.add(*ends)
        moving.mover.start(sequence.key, OLD, NEW, tokens=8)
        assert moving.tick() == pulls
        moving.mover.start(sequence.key, OLD, NEW)
        assert moving.tick() == 1


def test_moves_that_wait_for_room_do_not_hold_up_a_drain() -> None:
    """Two sequences wait for an answer about room, and their moves with them: the shards of others leave the
    worker that drains.
    """
    moving = Moving()
    asking = [moving.add(34) for _ in range(2)]
    assert {request.key for request in moving.scheduler.plan(0.0).room} == {item.key for item in asking}
    for sequence in asking:
        moving.mover.start(sequence.key, OLD, NEW)
    moving.pool.tell(is_admitting=False)
    others = [moving.add(60) for _ in range(3)]
    assert moving.tick() == 4
    assert {wanted.key for wanted, _ in moving.pool.pulls} == {item.key for item in (*asking, *others[:2])}


def test_moves_that_wait_for_room_are_bounded_too() -> None:
    """Where all that lies on a worker waits for room, a few of them begin to move, and no more."""
    moving = Moving()
    sequences = [moving.add(34) for _ in range(20)]
    assert len(moving.scheduler.plan(0.0).room) == len(sequences)
    moving.pool.tell(is_admitting=False)
    assert [moving.tick() for _ in range(3)] == [8] * 3
