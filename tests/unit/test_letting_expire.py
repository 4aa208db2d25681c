"""What leaves a shard map because no row will see it: which shards change, and who is told first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from cluster.types import Epoch, Generation, SequenceKey, ShardId, ShardRef, WorkerId
from tests.attention_builders import build_geometry
from tests.cluster_harness import request
from workers.dense.deltas import Delta, Outbox
from workers.dense.sequences import LiveSequence, Placed
from workers.dense.submissions import Door

A, B = WorkerId("a"), WorkerId("b")


class Witness:
    """Gateway, pool and inbox in one: notes what each is told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.posted: list[Callable[[], None]] = []

    def deliver(self, step: int, deltas: Sequence[Delta]) -> None:
        """See `Subscriber`."""
        self.told += [("map", delta.shard_map and delta.shard_map[0].first) for delta in deltas]

    def trim(self, key: SequenceKey, workers: Iterable[WorkerId], keep_from: int) -> None:
        """See `Pool.trim`."""
        self.told.append(("trim", sorted(workers), keep_from))


def placed(worker: WorkerId, first: int, end: int) -> Placed:
    """A shard; its id is its first position."""
    return Placed(ShardRef(worker, Epoch(1), ShardId(first), first, end), Generation(1))


def live(*shards: Placed) -> LiveSequence:
    """A sequence in blocks of four."""
    sequence = LiveSequence.of(request(range(50)), Witness(), 0.0, build_geometry(block_tokens=4))
    sequence.place(shards)
    return sequence


def test_the_gateway_has_the_map_before_a_worker_is_told() -> None:
    """The trimmed map leaves with the step's deltas; the call to the workers is made only after that."""
    witness, outbox = Witness(), Outbox()
    unused = cast(Any, None)
    pool = cast(Any, witness)
    door = Door(unused, unused, unused, pool, outbox, unused, witness.posted.append, unused, build_geometry())
    sequence = live(placed(A, 0, 8), placed(B, 8, 30), placed(A, 30, 50))
    sequence.subscriber = witness
    door.let_expire(sequence, 19)
    assert witness.told == []
    outbox.flush(1)
    for call in witness.posted:
        call()
    assert witness.told == [("map", 16), ("trim", [A, B], 16)]
    door.let_expire(sequence, 19)
    outbox.flush(2)
    assert len(witness.told) == 2, "nothing changed, nobody is told"


def test_a_shard_that_grows_stays_trimmed() -> None:
    """Its worker has not heard of the trim yet and answers with the range it still has."""
    sequence = live(placed(A, 2, 30))
    assert sequence.drop_before(17) == {A}
    sequence.place([placed(A, 2, 40)])
    (shard,) = sequence.shards
    assert (shard.shard.first, shard.shard.end, shard.is_trimmed) == (14, 40, True)
