"""Moves of one round: DistKV-LLM's greedy plan with the performance model."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.perfmodel import Line
from cluster.policies.planner import ArenaView, InstanceView, Move, PlannerPolicy, plan
from cluster.types import SequenceKey, WorkerId

POLICY = PlannerPolicy(block_tokens=32)
DENSE = Line(0.020, 0.001)
"""A step of this model: 20 ms for the weights, 1 ms a sequence."""
ATTENTION = Line(0.0, 1e-6)

Cache = dict[WorkerId, dict[SequenceKey, int]]


def instance(index: int, running: int, waiting: int = 0, waiting_tokens: float = 500.0) -> InstanceView:
    """A dense worker whose steps take as the model above says."""
    return InstanceView(WorkerId(f"dense-{index}"), running, waiting, waiting_tokens, DENSE, ATTENTION)


def arena(
    index: int,
    home: int | None,
    free: int,
    capacity: int = 8192,
    read: int | None = None,
    tier: int = 0,
    slot: str = "",
) -> ArenaView:
    """An arena of one instance, or of all; unless told else, nothing in it is shared."""
    owner, read = (
        None if home is None else WorkerId(f"dense-{home}"),
        capacity - free if read is None else read,
    )
    return ArenaView(WorkerId(f"attention-{index}"), owner, capacity, free, read, tier, slot)


def held(**tokens: dict[str, int]) -> Cache:
    """What lies where: a0={"r": 100} is 100 tokens of request r on attention-0."""
    return {
        WorkerId(f"attention-{name[1:]}"): {SequenceKey(key): count for key, count in cache.items()}
        for name, cache in tokens.items()
    }


def moves(instances: list[InstanceView], arenas: list[ArenaView], cache: Cache) -> tuple[Move, ...]:
    """A round."""

    def at(worker: WorkerId) -> Mapping[SequenceKey, int]:
        return cache.get(worker, {})

    return plan(instances, arenas, at, POLICY)


def test_a_debtor_gives_its_longest_sequence_to_the_roomiest_creditor() -> None:
    """One long request fills an instance while short ones wait: it goes where most room is, and only it."""
    instances = [instance(0, running=2, waiting=11), instance(1, running=8), instance(2, running=8)]
    arenas = [arena(0, 0, free=100), arena(1, 1, free=4000), arena(2, 2, free=7000)]
    cache = held(a0={"long": 7000, "short": 500}, a1={"other": 4000})
    (move,) = moves(instances, arenas, cache)
    assert (move.sequence, move.source, move.target) == (SequenceKey("long"), "attention-0", "attention-2")
    assert move.tokens % POLICY.block_tokens == 0
    assert 3500 <= move.tokens <= 7000 - 0.15 * 8192


def test_who_has_the_smallest_batch_is_served_first() -> None:
    """Debtors take turns in ascending order of their batches, as the paper has it."""
    instances = [instance(0, 4, waiting=20), instance(1, 1, waiting=20), instance(2, 8)]
    arenas = [arena(0, 0, free=0), arena(1, 1, free=0), arena(2, 2, free=8192)]
    found = moves(instances, arenas, held(a0={"a": 6000}, a1={"b": 6000}))
    assert found[0].sequence.request_id == "b"


def test_nothing_moves_where_nobody_lacks_room() -> None:
    """Instances with room enough for all that wait keep their caches."""
    instances = [instance(0, 4, waiting=2), instance(1, 4)]
    arenas = [arena(0, 0, free=4000), arena(1, 1, free=8000)]
    assert moves(instances, arenas, held(a0={"a": 4000})) == ()


def test_nothing_moves_where_the_model_sees_no_gain() -> None:
    """A full instance for which nobody waits gains nothing from room, and its creditor would be slowed."""
    instances = [instance(0, 4), instance(1, 4)]
    arenas = [arena(0, 0, free=0), arena(1, 1, free=8192)]
    assert moves(instances, arenas, held(a0={"a": 2000, "b": 2000, "c": 4000})) == ()


def test_a_worker_that_joins_gets_its_part() -> None:
    """Shared arenas are levelled where the fullest one holds steps up."""
    slow = Line(0.0, 1e-5)
    instances = [InstanceView(WorkerId("dense-0"), 8, 0, 0.0, DENSE, slow)]
    arenas = [arena(0, None, free=1000), arena(1, None, free=1000), arena(2, None, free=8192)]
    cache = held(a0={"a": 4000, "b": 3192}, a1={"c": 7192})
    found = moves(instances, arenas, cache)
    assert found, "nothing was levelled"
    assert {move.target for move in found} == {"attention-2"}
    assert {move.source for move in found} == {"attention-0", "attention-1"}


def test_blocks_that_many_share_are_replicated() -> None:
    """Of two arenas with room one is read by 32 sequences that share 2,000 tokens: some of them move, until
    about as much is read in both; moving more would gain nothing.
    """
    sequences = {SequenceKey(f"r{index:02d}"): 2048 for index in range(32)}
    here, there = WorkerId("attention-0"), WorkerId("attention-1")
    cache: Cache = {here: dict(sequences), there: {}}
    slow = InstanceView(WorkerId("dense-0"), 32, 0, 0.0, DENSE, Line(0.0, 1e-5))
    rounds = 0
    while found := moves([slow], _shared(cache, here, there), cache):
        rounds += 1
        for move in found:
            assert (move.source, move.target) == (here, there)
            cache[here][move.sequence] -= move.tokens
            cache[there][move.sequence] = cache[there].get(move.sequence, 0) + move.tokens
    read = [sum(cache[worker].values()) for worker in (here, there)]
    assert rounds >= 2, "a round moves a few"
    assert abs(read[0] - read[1]) <= 0.25 * 8192 + 2048


def _shared(cache: Cache, *workers: WorkerId) -> list[ArenaView]:
    """Arenas that hold what all sequences share once."""
    return [
        arena(
            index,
            None,
            free=8192 - max(cache[worker].values(), default=0),
            read=sum(cache[worker].values()),
        )
        for index, worker in enumerate(workers)
    ]


@pytest.mark.parametrize(("sharers", "moves_away"), [(1, True), (64, False)])
def test_what_others_share_is_not_moved_for_room(sharers: int, moves_away: bool) -> None:
    """A full arena of one sequence lends it away, so that another one may run; one that 64 sequences share
    block by block would be no emptier for it.
    """
    instances = [
        InstanceView(WorkerId(f"dense-{index}"), 8, waiting, 4000.0, DENSE, Line(0.0, 0.0))
        for index, waiting in enumerate((1, 0))
    ]
    arenas = [arena(0, 0, free=0, read=sharers * 8192), arena(1, 1, free=8192)]
    sequences = {f"r{index}": 8192 for index in range(sharers)}
    assert bool(moves(instances, arenas, held(a0=sequences))) is moves_away


SLOW = InstanceView(WorkerId("dense-0"), 8, 0, 0.0, DENSE, Line(0.0, 1e-5))
"""A dense worker that gains much from attention in several arenas side by side."""


def test_what_is_too_much_for_a_tier_goes_to_a_slower_one() -> None:
    """Of a full arena no more than is needed goes below, from its longest sequence, to the next tier that has
    room; not back, and not to level tiers, which are not as fast as each other.
    """
    arenas = [arena(0, None, free=0), arena(1, None, 8192, tier=1), arena(2, None, 90_000, 90_000, tier=2)]
    (move,) = moves([SLOW], arenas, held(a0={"long": 6000, "short": 2192}))
    assert (move.sequence, move.source, move.target) == (SequenceKey("long"), "attention-0", "attention-1")
    assert 0.15 * 8192 <= move.tokens <= 1504
    left = [arena(0, None, free=move.tokens), arena(1, None, free=8192 - move.tokens, tier=1)]
    assert moves([SLOW], left, held(a0={"long": 4500, "short": 2192}, a1={"long": 1500})) == ()


def test_a_process_keeps_what_it_lowers_while_it_has_room() -> None:
    """Another process's arena of the same tier, however roomy, is taken only where the own one is full."""
    arenas = [arena(0, None, free=0, slot="w0"), arena(2, None, 9000, 9000, tier=1, slot="w1")]
    own = arena(1, None, free=4000, tier=1, slot="w0")
    cache = held(a0={"a": 8192})
    assert [move.target for move in moves([SLOW], [*arenas, own], cache)] == [own.worker]
    full = arena(1, None, free=0, tier=1, slot="w0")
    assert [move.target for move in moves([SLOW], [*arenas, full], cache)] == ["attention-2"]


def test_instances_that_lend_nothing_keep_their_own_order() -> None:
    """Nothing leaves a debtor for another instance; between its own tiers it moves."""
    policy = PlannerPolicy(block_tokens=32, may_lend=False)
    instances = [instance(0, running=2, waiting=11), instance(1, running=8)]
    arenas = [arena(0, 0, free=0), arena(1, 0, free=4000, tier=1), arena(2, 1, free=8192)]
    cache = held(a0={"long": 8192}, a1={"other": 4192})
    found = plan(instances, arenas, lambda worker: cache.get(worker, {}), policy)
    assert {(move.source, move.target) for move in found} == {("attention-0", "attention-1")}
    lending = plan(instances, arenas, lambda worker: cache.get(worker, {}), POLICY)
    assert "attention-2" in {move.target for move in lending}


def test_a_better_tier_that_emptied_is_filled_again() -> None:
    """What lies below moves up as far as the better arena's mark, from the slowest tier first."""
    arenas = [arena(0, None, free=7000), arena(1, None, 4000, tier=1), arena(2, None, 5192, tier=2)]
    first, *others = moves([SLOW], arenas, held(a0={"a": 1192}, a1={"b": 4192}, a2={"c": 3000}))
    assert (first.sequence, first.source) == (SequenceKey("c"), "attention-2")
    assert sum(move.tokens for move in (first, *others) if move.target == "attention-0") <= 0.85 * 8192 - 1192
    nearly = [arena(0, None, free=3200), arena(1, None, 4000, tier=1)]
    assert moves([SLOW], nearly, held(a0={"a": 4992}, a1={"b": 4192})) == ()


def test_tiers_of_other_instances_are_theirs() -> None:
    """Instances that do not share have tiers of their own: neither full nor empty ones concern the others."""
    arenas = [arena(0, 0, free=0), arena(1, 1, free=8192, tier=1)]
    assert moves([instance(0, 4), instance(1, 4)], arenas, held(a0={"a": 8192})) == ()


def test_shared_blocks_are_not_lowered_in_vain() -> None:
    """Where 64 sequences share nearly all of a full arena, moving one of them would empty nothing."""
    arenas = [arena(0, None, free=0, read=64 * 8192), arena(1, None, free=8192, tier=1)]
    assert moves([SLOW], arenas, held(a0={f"r{index:02d}": 1024 for index in range(64)})) == ()


@st.composite
def _clusters(draw: st.DrawFn) -> tuple[list[InstanceView], list[ArenaView], Cache]:
    count = draw(st.integers(1, 4))
    is_shared = draw(st.booleans())
    instances = [
        instance(index, draw(st.integers(0, 16)), draw(st.integers(0, 16)), draw(st.floats(0, 4000)))
        for index in range(count)
    ]
    arenas, cache = [], {}
    for index in range(draw(st.integers(1, 6))):
        sizes = draw(st.lists(st.integers(1, 3000), max_size=5))
        capacity = draw(st.integers(max(1, sum(sizes)), 20_000))
        home, tier = None if is_shared else index % count, draw(st.integers(0, 2))
        arenas.append(arena(index, home, capacity - sum(sizes), capacity, tier=tier))
        cache[WorkerId(f"attention-{index}")] = {
            SequenceKey(f"r{index}-{number}"): size for number, size in enumerate(sizes)
        }
    return instances, arenas, cache


@settings(max_examples=300)
@given(_clusters())
def test_a_plan_can_always_be_carried_out(cluster: tuple[list[InstanceView], list[ArenaView], Cache]) -> None:
    """Whatever the cluster: whole blocks that are there, no sequence twice, no target filled beyond its mark
    or its room, no more moves than a round may have; and the same views give the same plan.
    """
    instances, arenas, cache = cluster
    found = moves(instances, arenas, cache)
    assert found == moves(instances, arenas, cache)
    assert len(found) <= POLICY.moves_most
    assert len({move.sequence for move in found}) == len(found)
    views = {view.worker: view for view in arenas}
    used = {view.worker: view.capacity_tokens - view.free_tokens for view in arenas}
    for move in found:
        assert move.tokens > 0
        assert move.tokens % POLICY.block_tokens == 0
        assert move.tokens <= cache[move.source][move.sequence]
        assert move.source != move.target
        used[move.source] -= move.tokens
        used[move.target] += move.tokens
    for target in {move.target for move in found}:
        assert used[target] <= POLICY.full_use * views[target].capacity_tokens + 1


@pytest.mark.parametrize("tiers", [1, 2])
def test_a_round_over_a_thousand_workers_takes_a_moment(tiers: int) -> None:
    """1,000 arenas with 100 sequences each, many of them short of room, or too full for their tier: 100 ms,
    in the best of three rounds.
    """
    instances = [instance(index, 2, waiting=8) for index in range(500)]
    arenas = [
        arena(
            index,
            index // 2 if tiers == 1 else None,
            free=50 if index < 800 else 8000,
            tier=index % tiers,
            slot=f"slot-{index // 2}",
        )
        for index in range(1000)
    ]
    cache = {
        view.worker: {SequenceKey(f"{view.worker}-{number}"): 60 + number for number in range(100)}
        for view in arenas
    }
    took_s = []
    for _ in range(3):
        began_s = time.perf_counter()
        assert len(moves(instances, arenas, cache)) == POLICY.moves_most
        took_s.append(time.perf_counter() - began_s)
    assert min(took_s) < 0.1
