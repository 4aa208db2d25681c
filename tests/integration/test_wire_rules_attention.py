"""The rules of the wire that a lane meets, each against a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from cluster.errors import (
    AnabranchError,
    Fenced,
    InvalidRequest,
)
from cluster.types import Generation, ShardId
from tests.attention_pool import Pool
from tests.attention_worker import (
    BLOCKS,
    GEOMETRY,
    DenseHost,
    DenseSide,
    SmallSequence,
    assert_attended,
    host_of,
    serving,
)
from workers.attention.worker import AttentionWorker
from workers.lanes.messages import PlanRow

torch.set_num_threads(1)


@pytest.fixture
def worker() -> Iterator[AttentionWorker]:
    """A worker of its own for each test."""
    with serving() as started:
        yield started


@pytest.fixture
def host(worker: AttentionWorker) -> Iterator[DenseHost]:
    """A dense worker's side of the worker."""
    with host_of(worker) as opened:
        yield opened


@pytest.fixture
def pool(host: DenseHost) -> Pool:
    """The worker's pool service."""
    return Pool(host.channel)


@pytest.fixture
def dense(worker: AttentionWorker, host: DenseHost) -> Iterator[DenseSide]:
    """A dense side over a unix socket lane."""
    side = DenseSide(host.open_lane())
    yield side
    side.lane.close()


def test_commit_needs_all_layers(pool: Pool, dense: DenseSide) -> None:
    """Keys of all layers but the last are not committed: a plan that counts on them is refused, naming
    the shard; writing them again makes them certain.
    """
    sequence = SmallSequence(1)
    shard = pool.reserve(sequence, 0, 40)
    part = (sequence, sequence.row(shard, 0, 9))
    dense.step([part], layers=range(GEOMETRY.layers))  # the message after the last layer is never sent
    assert pool.locate(sequence) == [0]
    following = (sequence, sequence.row(shard, 9, 1))
    with pytest.raises(Fenced, match=r"0\.\.9") as caught:
        dense.step([following])
    assert caught.value.metadata["shards"] == str(shard)
    dense.step([part])
    assert_attended(dense.step([following]), [following])
    assert pool.locate(sequence) == [9]


def test_a_write_at_committed_overwrites(pool: Pool, dense: DenseSide) -> None:
    """A step done again with other tokens leaves only the second's keys."""
    sequence, other = SmallSequence(1), SmallSequence(2)
    shard = pool.reserve(sequence, 0, 40)
    dense.step([(other, other.row(shard, 0, 9))])
    dense.step([(sequence, sequence.row(shard, 0, 9))])
    following = (sequence, sequence.row(shard, 9, 1))
    assert_attended(dense.step([following]), [following])


def test_write_below_committed_is_refused(pool: Pool, dense: DenseSide) -> None:
    """Committed positions never change: a chunk that starts below them is Fenced and writes nothing."""
    sequence = SmallSequence(1)
    shard = pool.reserve(sequence, 0, 40)
    dense.step([(sequence, sequence.row(shard, 0, 9))])
    dense.step([(sequence, sequence.row(shard, 9, 1))])
    other = SmallSequence(2)
    with pytest.raises(Fenced, match="below"):
        dense.step([(other, other.row(shard, 5, 1))])
    following = (sequence, sequence.row(shard, 10, 1))
    assert_attended(dense.step([following]), [following])


@pytest.mark.parametrize("visible", [(0, 12), (3, 12), (0, 5), (4, 5), (7, 7)])
def test_visible_range_is_exact(pool: Pool, dense: DenseSide, visible: tuple[int, int]) -> None:
    """The worker attends the named range, not its own idea of the length."""
    sequence = SmallSequence(1)
    shard = pool.reserve(sequence, 0, 40)
    dense.step([(sequence, sequence.row(shard, 0, 12))])
    part = (sequence, sequence.row(shard, 12, 3, visible))
    replies = dense.step([part])
    if visible[0] < visible[1]:
        assert_attended(replies, [part])
    else:
        assert all(bool(reply.lse.isneginf().all()) for reply in replies)


@pytest.mark.parametrize("visible", [(0, 13), (0, 40)])
def test_visible_beyond_committed_fails_closed(
    pool: Pool, dense: DenseSide, visible: tuple[int, int]
) -> None:
    """A range that is not all there is refused naming it; the step is not attended in part."""
    sequence, sound = SmallSequence(1), SmallSequence(2)
    shard, other = pool.reserve(sequence, 0, 40), pool.reserve(sound, 0, 40)
    dense.step([(sequence, sequence.row(shard, 0, 12)), (sound, sound.row(other, 0, 12))])
    bad = replace(sequence.row(shard, 39, 1, visible, tail=False), start=visible[1])
    with pytest.raises(Fenced, match=rf"{visible[0]}\.\.{visible[1]}") as caught:
        dense.step([(sound, sound.row(other, 12, 1)), (sequence, bad)], layers=[0])
    assert caught.value.metadata["shards"] == str(shard)
    dense.encoder.forget(0)
    part = (sound, sound.row(other, 12, 1))
    assert_attended(dense.step([part]), [part])


def test_trim_gives_back_what_no_row_sees(pool: Pool, dense: DenseSide) -> None:
    """Whole blocks before a certain position can be had again, and only those; the rest is attended as
    before; what is gone cannot be seen, and what is not certain yet, or another's, cannot be given up.
    """
    sequence = SmallSequence(1)
    shard = pool.reserve(sequence, 0, 40)
    dense.step([(sequence, sequence.row(shard, 0, 30))])
    with pytest.raises(Fenced, match="not certain"):
        pool.trim(sequence, 17)
    dense.step([(sequence, sequence.row(shard, 30, 1))])
    with pytest.raises(Fenced):
        pool.trim(sequence, 17, generation=0)
    assert pool.trim(sequence, 18) == 4
    assert pool.trim(sequence, 18) == pool.trim(sequence, 5) == 0
    blocks = pool.audit().blocks
    assert blocks.free + blocks.sealed_cached == BLOCKS - 6
    part = (sequence, sequence.row(shard, 31, 1, visible=(18, 31)))
    assert_attended(dense.step([part]), [part])
    with pytest.raises(Fenced, match=r"15\.\.32"):
        dense.step([(sequence, sequence.row(shard, 32, 1, visible=(15, 32)))], layers=[0])
    dense.encoder.forget(0)
    part = (sequence, sequence.row(shard, 32, 1, visible=(16, 32)))
    assert_attended(dense.step([part]), [part])


def test_adopt_fences_lower_generation(worker: AttentionWorker, host: DenseHost, pool: Pool) -> None:
    """After a take-over the older generation can neither attend, append, reserve, release nor adopt."""
    sequence = SmallSequence(1)
    shard = pool.reserve(sequence, 0, 40)
    old = DenseSide(host.open_lane())
    old.step([(sequence, sequence.row(shard, 0, 9))])
    old.step([(sequence, sequence.row(shard, 9, 1))])
    assert pool.adopt(sequence, 2, sequence.token_ids[:10]) == [9]
    with pytest.raises(Fenced):
        old.step([(sequence, sequence.row(shard, 10, 1))])
    for attempt in (
        lambda: pool.reserve(sequence, 40, 41),
        lambda: pool.release(sequence),
        lambda: pool.adopt(sequence, 1, sequence.token_ids),
    ):
        with pytest.raises(Fenced):
            attempt()
    heir = sequence.under(2)
    new = DenseSide(host.open_lane())
    part = (heir, heir.row(shard, 9, 1))
    assert_attended(new.step([part]), [part])


def test_a_step_under_way_is_fenced_by_a_take_over(
    worker: AttentionWorker, host: DenseHost, pool: Pool
) -> None:
    """A take-over between two layers stops the older step: it neither attends nor writes any more."""
    sequence = SmallSequence(1)
    shard = pool.reserve(sequence, 0, 40)
    old = DenseSide(host.open_lane())
    old.step([(sequence, sequence.row(shard, 0, 9))])
    parts = [(sequence, sequence.row(shard, 9, 1))]
    old.step(parts, layers=[0])
    assert pool.adopt(sequence, 2, sequence.token_ids[:9]) == [9]
    old.lane.send(old.message(parts, 1))
    with pytest.raises(Fenced):
        old.receive(1)


def test_adopt_truncates_to_common_prefix(worker: AttentionWorker, host: DenseHost, pool: Pool) -> None:
    """What the adopter's tokens do not confirm is dropped; what is left serves; the rest is written anew."""
    sequence = SmallSequence(1)
    shard = pool.reserve(sequence, 0, 40)
    dense = DenseSide(host.open_lane())
    dense.step([(sequence, sequence.row(shard, 0, 9))])
    dense.step([(sequence, sequence.row(shard, 9, 1))])
    wrong = (*sequence.token_ids[:6], 5000, *sequence.token_ids[7:20])
    assert pool.adopt(sequence, 2, wrong) == [6]
    heir = sequence.under(2)
    parts = [(heir, heir.row(shard, 6, 3))]
    assert_attended(dense.step(parts), parts)
    following = [(heir, heir.row(shard, 9, 1))]
    assert_attended(dense.step(following), following)


def test_an_append_never_allocates(pool: Pool, dense: DenseSide) -> None:
    """Steps move blocks from reserved to open to sealed; free ones stay free. Beyond the room: refused."""
    sequence = SmallSequence(1)
    shard = pool.reserve(sequence, 0, 8)
    free = pool.audit().blocks.free
    dense.step([(sequence, sequence.row(shard, 0, 5))])
    dense.step([(sequence, sequence.row(shard, 5, 1))])
    blocks = pool.audit().blocks
    assert (blocks.free, blocks.sealed_referenced, blocks.open, blocks.reserved) == (free, 1, 1, 0)
    with pytest.raises(Fenced, match="reserved"):
        dense.step([(sequence, sequence.row(shard, 6, 3))])
    assert pool.audit().blocks.free == free


SEQUENCE = SmallSequence(1)
NONSENSE: dict[str, Callable[[ShardId], PlanRow]] = {
    "no such shard": lambda shard: SEQUENCE.row(ShardId(shard + 999), 0, 1),
    "a generation not seen": lambda shard: replace(SEQUENCE.row(shard, 0, 1), generation=Generation(7)),
    "fewer ids than rows": lambda shard: replace(SEQUENCE.row(shard, 0, 3), token_ids=(1, 2)),
    "no rows": lambda shard: replace(SEQUENCE.row(shard, 0, 1), count=0, token_ids=()),
    "range backwards": lambda shard: replace(SEQUENCE.row(shard, 3, 1), visible_first=3, visible_end=1),
    "range after the row": lambda shard: replace(SEQUENCE.row(shard, 0, 1), visible_end=2),
    "an append that leaves the room": lambda shard: SEQUENCE.row(shard, 0, 30),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_nonsense_row_is_answered_and_harms_nothing(pool: Pool, dense: DenseSide, name: str) -> None:
    """A row that cannot be served gets an error; the lane lives and the store is as before."""
    sequence = SEQUENCE
    shard = pool.reserve(sequence, 0, 20)
    with pytest.raises(AnabranchError) as caught:
        dense.step([(sequence, NONSENSE[name](shard))], layers=[0])
    assert isinstance(caught.value, Fenced | InvalidRequest)
    assert pool.audit().blocks.reserved == GEOMETRY.blocks_for(20)
    dense.encoder.forget(0)
    dense.step([(sequence, sequence.row(shard, 0, 9))])
    part = (sequence, sequence.row(shard, 9, 1))
    assert_attended(dense.step([part]), [part])


def test_rows_that_do_not_fit_the_plan_are_refused(pool: Pool, dense: DenseSide) -> None:
    """More or fewer queries or keys than the plan names, or a layer nobody has, are answered by name."""
    sequence = SmallSequence(1)
    shard = pool.reserve(sequence, 0, 20)
    dense.step([(sequence, sequence.row(shard, 0, 3))])
    parts = [(sequence, sequence.row(shard, 3, 3))]
    dense.step(parts, layers=[0])
    good = dense.message(parts, 1)
    assert good.query is not None
    assert good.key is not None
    assert good.value is not None
    for bad in (
        replace(good, query=good.query[:2]),
        replace(good, key=good.key[:1], value=good.value[:1]),
        replace(good, layer=7),
    ):
        dense.lane.send(bad)
        with pytest.raises(AnabranchError):
            dense.receive(bad.layer)
    dense.step(parts)
    part = (sequence, sequence.row(shard, 3, 1))
    assert_attended(dense.step([part]), [part])


def test_shared_blocks_are_attended_where_they_lie(pool: Pool, dense: DenseSide) -> None:
    """A second sequence of the same tokens acquires what is committed, refers to the sealed blocks and copies
    the open one; it attends exactly its keys, goes on in room of its own, and outlives the first.
    """
    first, second = SmallSequence(1), SmallSequence(1, name="again")
    shard = pool.reserve(first, 0, 40)
    dense.step([(first, first.row(shard, 0, 14))])
    assert pool.acquire(second, 0, 14) == (0, 0)
    dense.step([(first, first.row(shard, 14, 1))])
    found, tokens = pool.acquire(second, 0, 14)
    assert tokens == 14
    assert pool.audit().blocks.sealed_referenced == 3
    assert pool.reserve(second, 14, 40) == found
    part = (second, second.row(found, 14, 3))
    assert_attended(dense.step([part]), [part])
    pool.release(first)
    part = (second, second.row(found, 17, 1))
    assert_attended(dense.step([part]), [part])


def test_shared_blocks_are_a_tenants_own(pool: Pool, dense: DenseSide) -> None:
    """Another tenant finds nothing of the same tokens."""
    first, second = SmallSequence(1), SmallSequence(1, name="again")
    shard = pool.reserve(first, 0, 40)
    dense.step([(first, first.row(shard, 0, 14))])
    dense.step([(first, first.row(shard, 14, 1))])
    assert pool.acquire(second, 0, 14, tenant="other") == (0, 0)
    assert pool.acquire(second, 0, 14)[1] == 14


def test_truncating_into_a_shared_block_drops_the_reference(pool: Pool, dense: DenseSide) -> None:
    """A take-over that confirms part of a shared block keeps the blocks before it; the other sharer still
    reads what it read.
    """
    first, second = SmallSequence(1), SmallSequence(1, name="again")
    shard = pool.reserve(first, 0, 40)
    dense.step([(first, first.row(shard, 0, 14))])
    dense.step([(first, first.row(shard, 14, 1))])
    pool.acquire(second, 0, 12)
    assert pool.adopt(second, 2, second.token_ids[:7]) == [4]
    part = (first, first.row(shard, 15, 1))
    assert_attended(dense.step([part]), [part])
