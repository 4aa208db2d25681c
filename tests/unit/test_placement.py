"""Placement: exact cover, nothing overcommitted, and the preferences that make shards spread."""

from __future__ import annotations

import itertools
from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.policies.placement import Allotment, PlacementPolicy, WorkerSpace, inadmissible, place
from cluster.types import Epoch, ShardId, ShardRef, WorkerId

POLICY = PlacementPolicy(block_tokens=16, shard_tokens=64, max_shards=8)


def space(
    name: str,
    free_tokens: int,
    *,
    epoch: int = 1,
    load: float = 0.0,
    is_local: bool = False,
    is_home: bool = True,
    tier: int = 0,
) -> WorkerSpace:
    """A worker that could hold 1,000 tokens and has some free."""
    return WorkerSpace(WorkerId(name), Epoch(epoch), free_tokens, 1000, load, is_local, is_home, tier)


def shard(name: str, first: int, end: int, *, epoch: int = 1) -> ShardRef:
    """A shard of the sequence under test."""
    return ShardRef(WorkerId(name), Epoch(epoch), ShardId(first), first, end)


def allotted(*pieces: tuple[str, int, int]) -> tuple[Allotment, ...]:
    """Allotments in the first life of each worker."""
    return tuple(Allotment(WorkerId(name), Epoch(1), first, end) for name, first, end in pieces)


def test_a_sequence_spreads_over_another_worker_for_each_shard() -> None:
    """Every shard_tokens the worker with fewest shards of it and most space follows."""
    workers = [space("a", 160), space("b", 320), space("c", 240)]
    assert place(0, 150, (), workers, POLICY) == allotted(("b", 0, 64), ("c", 64, 128), ("a", 128, 150))


def test_the_tail_grows_before_another_worker_follows() -> None:
    """The shard before the range takes tokens up to shard_tokens, even on the fullest worker."""
    workers = [space("a", 48), space("b", 320)]
    tail = [shard("a", 0, 40)]
    assert place(40, 70, tail, workers, POLICY) == allotted(("a", 40, 64), ("b", 64, 70))


def test_a_shard_of_an_earlier_life_does_not_grow() -> None:
    """A tail whose worker restarted is gone: the range goes to a live epoch."""
    workers = [space("a", 320, epoch=2)]
    placed = place(40, 70, [shard("a", 0, 40)], workers, POLICY)
    assert placed == (Allotment(WorkerId("a"), Epoch(2), 40, 70),)


def test_the_local_worker_is_filled_first_and_the_rest_overflows() -> None:
    """Local plus overflow: what fits stays, whatever the shard size; the rest is borrowed."""
    workers = [space("far", 960), space("here", 96, is_local=True)]
    assert place(0, 120, (), workers, POLICY) == allotted(("here", 0, 96), ("far", 96, 120))


def test_other_instances_lend_only_what_is_lacking_at_home() -> None:
    """A sequence spreads over its instance's own workers while they have room, and borrows the rest."""
    workers = [space("lender", 960, is_home=False), space("home-a", 96), space("home-b", 80)]
    assert place(0, 176, (), workers, POLICY)[-1].worker != "lender"
    borrowing = place(0, 200, (), workers, POLICY)
    assert [(item.worker, item.first, item.end) for item in borrowing if item.worker == "lender"] == [
        ("lender", 176, 200)
    ]


def test_the_better_tiers_are_filled_first() -> None:
    """A sequence spreads over the best tier while that has room, whoever has most; then over the next. A tier
    at home comes before a better one that is borrowed.
    """
    workers = [space("slow", 960, tier=1), space("fast-a", 96), space("fast-b", 80)]
    assert place(0, 176, (), workers, POLICY)[-1].worker != "slow"
    assert place(0, 200, (), workers, POLICY)[-1] == allotted(("slow", 176, 200))[0]
    borrowed = [space("slow", 960, tier=1), space("lender", 960, is_home=False)]
    assert place(0, 64, (), borrowed, POLICY) == allotted(("slow", 0, 64))


def test_a_full_worker_is_passed_over() -> None:
    """When the tail's worker is full the last block's slack is used and the rest goes elsewhere."""
    workers = [space("a", 0), space("b", 32)]
    tail = [shard("a", 0, 20)]
    assert place(20, 60, tail, workers, POLICY) == allotted(("a", 20, 32), ("b", 32, 60))
    assert place(20, 80, tail, workers, POLICY) == ()


def test_equal_space_goes_to_the_idle() -> None:
    """Load breaks ties of space."""
    workers = [space("a", 64, load=0.9), space("b", 64, load=0.1)]
    assert place(0, 64, (), workers, POLICY) == allotted(("b", 0, 64))


def test_few_shards_left_make_larger_shards() -> None:
    """A sequence near max_shards fills whole workers rather than failing."""
    workers = [space("a", 320), space("b", 640)]
    shards = [shard("gone", 16 * index, 16 * index + 16, epoch=9) for index in range(7)]
    assert place(112, 700, shards, workers, POLICY) == allotted(("b", 112, 700))
    assert place(112, 800, shards, workers, POLICY) == ()


def test_a_long_prompt_leaves_shards_for_growth() -> None:
    """When shard_tokens would take all shards, shards grow so that at most half are taken."""
    workers = [space("a", 960), space("b", 960)]
    placed = place(0, 960, (), workers, POLICY)
    assert len(placed) == POLICY.max_shards / 2
    assert Counter(item.worker for item in placed) == {"a": 2, "b": 2}


def test_what_can_never_fit_is_named() -> None:
    """Capacity, not free space, decides; the reason names both sizes."""
    workers = [space("a", 0), space("b", 0)]
    assert inadmissible(2000, workers, POLICY) is None
    assert "2001 tokens" in str(inadmissible(2001, workers, POLICY))
    assert "2 arenas hold 2000" in str(inadmissible(2001, workers, POLICY))
    single = PlacementPolicy(block_tokens=16, shard_tokens=64, max_shards=1)
    assert "1 arena holds 1000" in str(inadmissible(1001, workers, single))


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.integers(1, 9),
    st.integers(1, 60),
    st.integers(0, 8),
    st.lists(st.integers(1, 100), min_size=1, max_size=20),
)
def test_a_sequence_grows_until_every_worker_is_full(
    arenas_blocks: list[int], block_tokens: int, shard_tokens: int, shards_more: int, pieces: list[int]
) -> None:
    """However a sequence grows, piece by piece: where shards are twice the workers, no block stays unused."""
    policy = PlacementPolicy(block_tokens, shard_tokens, 2 * len(arenas_blocks) + shards_more)
    capacity = block_tokens * sum(arenas_blocks)
    held: list[ShardRef] = []
    position = 0
    for piece in itertools.cycle(pieces):
        if position == capacity:
            return
        end = min(capacity, position + piece)
        used = Counter[str]()
        for each in held:
            used[each.worker] += blocks(each.end - each.first, policy)
        workers = [
            space(f"w{index}", (size - used[f"w{index}"]) * block_tokens)
            for index, size in enumerate(arenas_blocks)
        ]
        placed = place(position, end, held, workers, policy)
        assert placed, (position, held)
        for item in placed:
            grown = next((s for s in held if s.end == item.first and s.worker == item.worker), None)
            held = [each for each in held if each is not grown]
            held.append(shard(item.worker, grown.first if grown else item.first, item.end))
        position = end


@st.composite
def situations(
    draw: st.DrawFn,
) -> tuple[int, int, list[ShardRef], list[WorkerSpace], PlacementPolicy]:
    """Some workers, some shards up to the range's start, and a range."""
    policy = PlacementPolicy(draw(st.integers(1, 33)), draw(st.integers(1, 200)), draw(st.integers(1, 6)))
    count = draw(st.integers(0, 5))
    workers = [
        space(
            f"w{index}",
            draw(st.integers(0, 300)),
            is_local=index == 0 and draw(st.booleans()),
            is_home=draw(st.booleans()),
            tier=draw(st.integers(0, 2)),
        )
        for index in range(count)
    ]
    shards: list[ShardRef] = []
    first = 0
    for _ in range(draw(st.integers(0, policy.max_shards))):
        end = first + draw(st.integers(1, 100))
        name = f"w{draw(st.integers(0, 5))}"
        if not shards or shards[-1].worker != name:
            shards.append(shard(name, first, end))
            first = end
    return first, first + draw(st.integers(1, 600)), shards, workers, policy


def blocks(tokens: int, policy: PlacementPolicy) -> int:
    """Blocks a shard of this many tokens holds."""
    return policy.whole_blocks(tokens) // policy.block_tokens


@given(situations())
def test_allotments_cover_exactly_and_never_overcommit(
    situation: tuple[int, int, list[ShardRef], list[WorkerSpace], PlacementPolicy],
) -> None:
    """Whatever the space: a placement covers the range in order, within free blocks and max_shards."""
    first, end, shards, workers, policy = situation
    placed = place(first, end, shards, workers, policy)
    if not placed:
        return
    assert [placed[0].first, placed[-1].end] == [first, end]
    assert all(one.end == two.first and one.worker != two.worker for one, two in pairwise(placed))
    used: Counter[str] = Counter()
    grows = bool(shards) and shards[-1].worker == placed[0].worker
    for index, item in enumerate(placed):
        before = shards[-1] if index == 0 and grows else None
        shard_first = before.first if before else item.first
        held = blocks(before.end - before.first, policy) if before else 0
        used[item.worker] += blocks(item.end - shard_first, policy) - held
    free = {item.worker: item.free_tokens // policy.block_tokens for item in workers}
    assert all(used[worker] <= free[WorkerId(worker)] for worker in used)
    assert len(shards) + len(placed) - grows <= policy.max_shards


@given(situations())
def test_what_fits_is_placed(
    situation: tuple[int, int, list[ShardRef], list[WorkerSpace], PlacementPolicy],
) -> None:
    """A fresh sequence that the largest spaces can hold within max_shards is never turned away."""
    _, end, _, workers, policy = situation
    largest = sorted((item.free_tokens // policy.block_tokens for item in workers), reverse=True)
    fits = blocks(end, policy) <= sum(largest[: policy.max_shards])
    assert bool(place(0, end, (), workers, policy)) == fits
