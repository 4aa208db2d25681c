"""The wire's rules at one attention worker, by name."""

from __future__ import annotations

import pytest

from cluster.clock import ManualClock
from cluster.errors import Fenced, InvalidRequest, ResourceExhausted, Unavailable
from tests.attention_builders import LEASE_MS, build_memory, build_store, chunk, generation, key, reading
from workers.attention.shard_blocks import BlockAccount
from workers.attention.store import Store
from workers.peer import Adoption


def free(store: Store) -> int:
    """Free blocks of an account that adds up."""
    return store.audit().free


def test_the_account_has_a_state_for_every_block() -> None:
    """Full committed blocks are sealed, touched ones open, the rest of a shard reserved."""
    memory = build_memory(blocks=10)
    shard = memory.reserve("a", 0, 22)
    assert memory.store.audit() == BlockAccount(10, 4, 6, 0, 0, 0)
    memory.run(chunk(shard, 0, 9))
    assert memory.store.audit() == BlockAccount(10, 4, 3, 3, 0, 0)
    memory.begin(chunk(shard, 9, 1))
    assert memory.store.audit() == BlockAccount(10, 4, 3, 1, 2, 0) == memory.store.account()


def test_a_reservation_extends_the_shard_that_ends_there() -> None:
    """Room from a shard's end on grows that shard; room elsewhere is another shard."""
    store = build_store()
    first = store.reserve(key(), generation(1), 0, 6)
    within = store.reserve(key(), generation(1), 6, 8)
    assert (within.shard.shard, within.shard.end, within.blocks_available) == (first.shard.shard, 8, 14)
    grown = store.reserve(key(), generation(1), 8, 13)
    assert (grown.shard.shard, grown.shard.first, grown.shard.end) == (first.shard.shard, 0, 13)
    assert grown.blocks_available == free(store) == 12
    beyond = store.reserve(key(), generation(1), 20, 21)
    assert beyond.shard.shard != first.shard.shard
    assert [held.shard.end for held in store.locate(key())] == [13, 21]


@pytest.mark.parametrize(("first", "end"), [(4, 4), (5, 4), (-1, 3)])
def test_an_empty_range_is_refused(first: int, end: int) -> None:
    """There is no shard without positions."""
    store = build_store()
    with pytest.raises(InvalidRequest, match="no range"):
        store.reserve(key(), generation(1), first, end)
    assert store.locate(key()) == ()


@pytest.mark.parametrize(("first", "end"), [(0, 8), (7, 9), (8, 13), (8, 40), (12, 14), (15, 17)])
def test_no_position_is_reserved_twice(first: int, end: int) -> None:
    """A range that overlaps any shard of the sequence is refused, also where it would extend another."""
    store = build_store()
    store.reserve(key(), generation(1), 0, 8)
    store.reserve(key(), generation(1), 12, 16)
    before = store.locate(key())
    with pytest.raises(InvalidRequest, match="overlaps"):
        store.reserve(key(), generation(1), first, end)
    assert store.locate(key()) == before
    assert free(store) == 13


def test_commit_needs_all_layers() -> None:
    """A step with a layer missing is not committed by the next, whose sequence is fenced; a repeat heals."""
    memory = build_memory()
    shard = memory.reserve("a", 0, 16)
    first = chunk(shard, 0, 5)
    memory.append(memory.begin(first), [first], layer=0)
    with pytest.raises(Fenced, match="miss layers"):
        memory.begin(chunk(shard, 5, 1))
    assert memory.committed("a") == [(0, 0)]
    memory.run(first)
    memory.begin(chunk(shard, 5, 1))
    assert memory.committed("a") == [(0, 5)]


def test_a_write_at_the_committed_length_overwrites() -> None:
    """A chunk that was written but not committed is written again, with other tokens."""
    memory = build_memory()
    shard = memory.reserve("a", 0, 16)
    memory.run(chunk(shard, 0, 5))
    memory.run(chunk(shard, 5, 4, token=100))
    memory.run(chunk(shard, 5, 2))
    memory.begin(reading(shard, 7))
    assert memory.store.adopt(key("a"), generation(2), range(16)).shards[0].committed_tokens == 7


def test_a_write_below_the_committed_length_is_refused() -> None:
    """What is certain stays: an append below it is fenced by name of the shard."""
    memory = build_memory()
    shard = memory.reserve("a", 0, 16)
    memory.run(chunk(shard, 0, 5))
    memory.run(chunk(shard, 5, 1))
    with pytest.raises(Fenced, match="append at 3 lies below") as caught:
        memory.begin(chunk(shard, 3, 3))
    assert caught.value.metadata["shards"] == str(shard.shard)
    memory.begin(reading(shard, 6))
    assert memory.committed("a") == [(0, 6)]


def test_visible_range_is_exact_or_fails_closed() -> None:
    """Any part of what is certain may be named; a position more on either side is fenced."""
    memory = build_memory()
    shard = memory.reserve("a", 4, 20)
    memory.run(chunk(shard, 4, 6))
    step = memory.begin(reading(shard, 10, visible=(5, 9)))
    assert [(span.visible_start, span.visible_end) for span in step.spans] == [(1, 5)]
    memory.begin(reading(shard, 10, visible=(4, 10)))
    for visible in ((3, 10), (4, 11)):
        with pytest.raises(Fenced, match=f"visible {visible[0]}..{visible[1]}, held 4..10"):
            memory.begin(reading(shard, 11, visible=visible))


def test_adopt_fences_lower_generations() -> None:
    """After a take-over the older speaker may do nothing, and what it had begun ends."""
    memory = build_memory()
    store, shard = memory.store, memory.reserve("a", 0, 16, life=3)
    memory.run(chunk(shard, 0, 5, life=3))
    row = chunk(shard, 5, 1, life=3)
    begun = memory.begin(row)
    before = memory.arena.layer(0).key.isnan().logical_not().sum()
    (held,) = store.adopt(key("a"), generation(4), range(5)).shards
    assert (held.shard, held.committed_tokens, held.generation) == (shard, 5, 4)
    memory.append(begun, [row], layer=0)
    assert memory.arena.layer(0).key.isnan().logical_not().sum() == before
    for life in (1, 2, 3):
        with pytest.raises(Fenced):
            memory.begin(chunk(shard, 5, 1, life=life))
        with pytest.raises(Fenced):
            store.reserve(key("a"), generation(life), 16, 20)
        with pytest.raises(Fenced):
            store.release(key("a"), generation(life))
        with pytest.raises(Fenced):
            store.adopt(key("a"), generation(life), range(5))
    memory.run(chunk(shard, 5, 1, life=4))


def test_a_higher_generation_takes_over_before_it_steps() -> None:
    """A plan under a generation that never reserved or adopted here is fenced, however new."""
    memory = build_memory()
    shard = memory.reserve("a", 0, 16)
    with pytest.raises(Fenced, match="generation 2 spoke, 1 holds it"):
        memory.begin(chunk(shard, 0, 1, life=2))
    memory.run(chunk(shard, 0, 1))


def test_adopt_of_an_unknown_sequence_fences_too() -> None:
    """Nothing is held, and still a lower generation cannot begin; the adopter can."""
    store = build_store()
    assert store.adopt(key(), generation(5), (1, 2, 3)) == Adoption()
    with pytest.raises(Fenced):
        store.reserve(key(), generation(4), 0, 4)
    store.reserve(key(), generation(5), 0, 4)


@pytest.mark.parametrize(
    ("confirmed", "differs_at", "left"),
    [(9, None, 7), (7, None, 7), (4, None, 4), (9, 3, 3), (9, 0, 0), (0, None, 0)],
)
def test_adopt_truncates_to_the_common_prefix(confirmed: int, differs_at: int | None, left: int) -> None:
    """min(committed, longest common prefix) survives; a shard of which nothing is left is freed."""
    memory = build_memory()
    shard = memory.reserve("a", 0, 16)
    memory.run(chunk(shard, 0, 7))
    memory.run(chunk(shard, 7, 2))
    token_ids = [-1 if position == differs_at else position for position in range(confirmed)]
    held = memory.store.adopt(key("a"), generation(2), token_ids).shards
    assert [part.committed_tokens for part in held] == ([left] if left else [])
    assert free(memory.store) == (12 if left else 16)


def test_after_a_token_that_differs_later_shards_are_void() -> None:
    """Keys depend on all tokens before them: shards behind a difference go, those behind a hole stay."""
    memory = build_memory()
    rows = [chunk(memory.reserve("a", first, first + 4), first, 4) for first in (8, 0, 16)]
    memory.run(*rows)
    memory.begin(*(reading(memory.store.locate(key("a"))[i].shard, 20) for i in range(3)))
    token_ids = list(range(20))
    held = memory.store.adopt(key("a"), generation(2), token_ids).shards
    assert [part.shard.first for part in held] == [0, 8, 16]
    token_ids[9] = -1
    adopted = memory.store.adopt(key("a"), generation(3), token_ids)
    assert adopted.first_difference == 9
    held = adopted.shards
    assert [(part.shard.first, part.committed_tokens) for part in held] == [(0, 4), (8, 1)]
    assert free(memory.store) == 14


def test_a_repeated_adopt_shows_what_is_held() -> None:
    """When the answer was lost the same take-over may be asked for again; it takes nothing away."""
    memory = build_memory()
    shard = memory.reserve("a", 0, 16)
    memory.run(chunk(shard, 0, 7))
    memory.begin(reading(shard, 7))
    first = memory.store.adopt(key("a"), generation(2), range(7))
    assert memory.store.adopt(key("a"), generation(2), range(3)) == first
    assert memory.committed("a") == [(0, 7)]


def test_a_released_generation_stays_fenced() -> None:
    """A released sequence is gone for that generation: it cannot begin, take over, or count on a lease."""
    store = build_store()
    store.reserve(key(), generation(2), 0, 9)
    assert store.release(key(), generation(2)) == 3
    assert store.release(key(), generation(2)) == 0
    assert store.renew([key()]) == (key(),)
    with pytest.raises(Fenced, match="released"):
        store.reserve(key(), generation(2), 0, 9)
    with pytest.raises(Fenced, match="released"):
        store.adopt(key(), generation(2), ())
    with pytest.raises(Fenced):
        store.release(key(), generation(1))
    store.reserve(key(), generation(3), 0, 9)


def test_a_release_by_a_higher_generation_frees() -> None:
    """Whoever took a sequence over elsewhere may free what an older life left here, and fences it."""
    store = build_store()
    store.reserve(key(), generation(2), 0, 9)
    assert store.release(key(), generation(4)) == 3
    with pytest.raises(Fenced):
        store.reserve(key(), generation(3), 0, 9)


def test_lease_expires_and_frees() -> None:
    """A sequence nobody speaks for is freed at the lease's end and its generation fenced."""
    clock = ManualClock()
    memory = build_memory(clock=clock)
    store = memory.store
    silent, renewed, spoken = (memory.reserve(name, 0, 8) for name in ("silent", "renewed", "spoken"))
    clock.advance(LEASE_MS / 1000 - 0.1)
    assert store.renew([key("renewed"), key("nobody")]) == (key("nobody"),)
    memory.begin(chunk(spoken, 0, 1))
    assert store.expire() == ()
    clock.advance(0.1)
    assert store.expire() == (key("silent"),)
    assert store.leases_expired == 1
    assert free(store) == 12
    assert [shard_key.request_id for shard_key, _, _ in store.holdings()] == ["renewed", "spoken"]
    with pytest.raises(Fenced, match="not held"):
        memory.begin(chunk(silent, 0, 1))
    with pytest.raises(Fenced, match="released"):
        memory.reserve("silent", 0, 8)
    memory.begin(chunk(renewed, 0, 1))


def test_a_higher_generation_starts_from_nothing() -> None:
    """A reservation under a higher generation frees what the lower one had, which is fenced then."""
    memory = build_memory()
    old = memory.reserve("a", 0, 9)
    memory.run(chunk(old, 0, 5))
    new = memory.reserve("a", 0, 4, life=2)
    assert new.shard != old.shard
    assert memory.committed("a") == [(0, 0)]
    assert free(memory.store) == 15
    with pytest.raises(Fenced):
        memory.reserve("a", 9, 12)
    with pytest.raises(Fenced, match="not held"):
        memory.begin(chunk(old, 5, 1))


def test_a_higher_generation_may_use_the_room_of_the_lower() -> None:
    """What the older life holds counts as free for the newer one."""
    store = build_store(blocks=4)
    store.reserve(key(), generation(1), 0, 12)
    store.reserve(key(), generation(2), 0, 16)
    assert free(store) == 0


def test_draining_refuses_what_is_new() -> None:
    """No sequence and no life of one begins at a draining worker; what is held may grow and be taken over."""
    store = build_store()
    shard = store.reserve(key(), generation(1), 0, 8).shard
    store.draining = True
    with pytest.raises(Unavailable, match="draining"):
        store.reserve(key("b"), generation(1), 0, 4)
    with pytest.raises(Unavailable, match="draining"):
        store.reserve(key(), generation(2), 0, 4)
    assert store.reserve(key(), generation(1), 8, 12).shard.shard == shard.shard
    with pytest.raises(Fenced):
        store.reserve(key(), generation(0), 12, 16)


def test_a_worker_is_empty_when_nothing_is_held() -> None:
    """`empty` follows the last sequence, however it left."""
    clock = ManualClock()
    store = build_store(clock=clock)
    assert store.empty.is_set()
    store.reserve(key(), generation(1), 0, 4)
    store.reserve(key(), generation(2), 0, 4)
    assert not store.empty.is_set()
    store.release(key(), generation(2))
    assert store.empty.is_set()
    store.reserve(key(), generation(3), 0, 4)
    store.adopt(key(), generation(4), ())
    assert store.empty.is_set()
    store.reserve(key("b"), generation(1), 0, 4)
    clock.advance(LEASE_MS / 1000)
    store.expire()
    assert store.empty.is_set()


def test_a_refused_reservation_changes_nothing() -> None:
    """No room for a new, a growing or a reborn sequence: shards, leases and generations stay as they were."""
    clock = ManualClock()
    store = build_store(blocks=8, clock=clock)
    store.reserve(key("a"), generation(1), 0, 12)
    store.reserve(key("b"), generation(1), 0, 16)
    before = store.holdings()
    for name, life, first, end in (("c", 1, 0, 8), ("a", 1, 12, 20), ("a", 1, 16, 24), ("a", 2, 0, 20)):
        with pytest.raises(ResourceExhausted):
            store.reserve(key(name), generation(life), first, end)
        assert store.holdings() == before
        assert free(store) == 1
    store.reserve(key("a"), generation(1), 12, 16)
    assert free(store) == 0


def test_the_fences_are_bounded() -> None:
    """Of released sequences the last 65,536 stay fenced; the oldest is forgotten first."""
    store = build_store()
    for number in range(65_537):
        store.release(key(str(number)), generation(1))
    with pytest.raises(Fenced):
        store.reserve(key("1"), generation(1), 0, 4)
    store.reserve(key("0"), generation(1), 0, 4)


def test_a_key_is_free_again_two_leases_after_its_end() -> None:
    """An ended life stays fenced as long as somebody may speak for it; then a new one begins from 1, and what
    is late after all, under the id of a shard of the old one, does not reach it.
    """
    memory = build_memory(clock=ManualClock())
    store = memory.store
    old = memory.reserve("a", 0, 8, life=5)
    memory.run(chunk(old, 0, 5, life=5))
    store.release(key(), generation(5))
    memory.clock.advance(2 * LEASE_MS / 1000 - 0.1)
    for late in (generation(1), generation(5)):
        with pytest.raises(Fenced, match=r"released|after"):
            store.reserve(key(), late, 0, 4)
        with pytest.raises(Fenced):
            store.adopt(key(), late, range(5))
    memory.clock.advance(0.2)
    new = memory.reserve("a", 0, 8, life=1)
    memory.run(chunk(new, 0, 3))
    with pytest.raises(Fenced, match="not held"):
        memory.begin(chunk(old, 5, 1, life=5))
    memory.begin(reading(new, 3))
    assert memory.committed("a") == [(0, 3)]


def test_a_fence_that_is_seen_again_lasts_anew() -> None:
    """Two leases count from the last time an ended life was fenced, and only the highest counts."""
    store = build_store(clock=(clock := ManualClock()))
    store.release(key(), generation(5))
    clock.advance(1.5 * LEASE_MS / 1000)
    store.release(key(), generation(6))
    clock.advance(1.5 * LEASE_MS / 1000)
    with pytest.raises(Fenced):
        store.reserve(key(), generation(6), 0, 4)


def test_a_shard_is_looked_up_within_a_turn() -> None:
    """Looking a shard up without the turn is a bug: it could be freed before it is read."""
    store = build_store()
    shard = store.reserve(key(), generation(1), 0, 4).shard
    with pytest.raises(AssertionError):
        store.shard(shard.shard, generation(1))
    with store.turns:
        assert store.is_held(store.shard(shard.shard, generation(1)), generation(1))
