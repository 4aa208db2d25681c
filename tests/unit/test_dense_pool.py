"""Rooms, members and the inbox of a dense worker, against attention workers that are plain stores."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import partial

import pytest

from cluster.clock import ManualClock
from cluster.errors import DeadlineExceeded, Fenced, LeaseOver, Unavailable
from cluster.policies.placement import PlacementPolicy
from cluster.policies.ranges import join
from cluster.types import Epoch, Generation, KvGeometry, SequenceKey, WorkerId
from workers.attention.local_peer import LocalPeer
from workers.attention.session import AttendSession
from workers.attention.store import Store
from workers.dense.holders import Held, Holders
from workers.dense.inbox import Inbox
from workers.dense.members import AttentionMember, MemberTable
from workers.dense.prefixes import BlockChain
from workers.dense.rooms import PullWanted, Rooms, RoomWanted
from workers.dense.sequences import Placed, wire_generation
from workers.peer import Adoption, ShardPrefix

GEOMETRY = KvGeometry(
    layers=1, query_heads=1, kv_heads=1, head_size=8, dtype="float32", block_tokens=4, digest="tiny"
)
POLICY = PlacementPolicy(block_tokens=4, shard_tokens=8, max_shards=8)
KEY = SequenceKey("request")
ONE = Generation(1)


class Workers:
    """Attention workers of a few blocks each, their members, and rooms over them."""

    def __init__(self, *blocks: int) -> None:
        self.clock = ManualClock()
        self.members = MemberTable()
        self.holders = Holders()
        self.over: list[tuple[WorkerId, Generation]] = []
        self.rooms = Rooms(
            self.members, self.holders, POLICY, lambda _key, worker, over: self.over.append((worker, over))
        )
        self.stores: list[Store] = []
        named = []
        for index, count in enumerate(blocks):
            worker, epoch = WorkerId(f"w{index}"), Epoch(index + 1)
            self.stores.append(Store(worker, epoch, GEOMETRY, count, 1000, self.clock))
            named.append(AttentionMember(worker, epoch, "", count, count))
        self.members.update(named)
        for member, store in zip(named, self.stores, strict=True):
            self.members.connected(member, LocalPeer(store, _no_session))

    def reserve(
        self, first: int, end: int, generation: Generation = ONE, shards: tuple[Placed, ...] = ()
    ) -> tuple[Placed, ...]:
        """Reserve positions for `KEY`."""
        return self.rooms.reserve(RoomWanted(KEY, generation, BlockChain(GEOMETRY, ""), first, end, shards))

    def computed(self, shards: Iterable[Placed]) -> None:
        """All positions of these shards are appended and committed."""
        for placed in shards:
            (store,) = (store for store in self.stores if store.worker == placed.shard.worker)
            with store.turns:
                store.fill(store.shard(placed.shard.shard, ONE), range(placed.shard.first, placed.shard.end))

    def taken(self, worker: WorkerId) -> Held:
        """What a worker holds of `KEY`, which the holders forget."""
        held = self.holders.take_one(KEY, worker)
        assert held is not None
        return held

    def held(self) -> list[int]:
        """Blocks held at each worker."""
        return [store.audit().capacity - store.audit().free for store in self.stores]


def _no_session() -> AttendSession:
    raise AssertionError("no lane is opened here")


def ranges(placed: tuple[Placed, ...]) -> list[tuple[int, int]]:
    """Positions of shards."""
    return [(item.shard.first, item.shard.end) for item in placed]


def test_what_drains_goes_to_the_best_tier_that_has_room() -> None:
    """Of the workers that have so much room: the best tier before the roomiest; none where nobody has it."""
    table = MemberTable()
    tiers = {"leaves": (0, 90), "fast": (0, 4), "roomier": (0, 6), "slow": (1, 50)}
    members = [
        AttentionMember(WorkerId(name), Epoch(1), "", 100, free, tier=tier)
        for name, (tier, free) in tiers.items()
    ]
    table.update(members)
    for member in members:
        store = Store(member.worker, member.epoch, GEOMETRY, 100, 1000, ManualClock())
        table.connected(member, LocalPeer(store, _no_session))
    found = [table.roomiest(apart_from=WorkerId("leaves"), blocks=blocks) for blocks in (3, 5, 7, 51)]
    assert found == ["roomier", "roomier", "slow", None]


def test_a_range_spreads_over_workers_and_is_released_whole() -> None:
    """A long range becomes shards that touch, on several workers; a release frees them all."""
    workers = Workers(4, 4, 4)
    placed = workers.reserve(0, 20)
    assert ranges(placed)[0][0] == 0
    assert ranges(placed)[-1][1] == 20
    assert len({item.shard.worker for item in placed}) == 3
    workers.rooms.release(KEY)
    assert workers.held() == [0, 0, 0]


def test_a_worker_that_refuses_is_passed_over() -> None:
    """Reported space may be stale: where the reservation is refused the rest is placed elsewhere."""
    workers = Workers(4, 2)
    workers.stores[0].reserve(SequenceKey("other"), ONE, 0, 16)
    placed = workers.reserve(0, 8)
    assert [item.shard.worker for item in placed] == ["w1"]
    assert workers.members.spaces(4)[0].free_tokens == 0


def test_room_for_a_part_is_granted_as_far_as_it_goes() -> None:
    """When the workers fill up on the way, what was reserved by then is the answer."""
    workers = Workers(4, 2)
    workers.stores[1].reserve(SequenceKey("other"), ONE, 0, 8)
    assert ranges(workers.reserve(0, 24)) == [(0, 8)]
    assert workers.reserve(0, 1000) == ()


def test_a_shard_grows_under_the_generation_it_has() -> None:
    """After a loss elsewhere raised the generation, a shard that stayed grows under its own: a worker that
    sees a higher one would start it from nothing.
    """
    workers = Workers(4)
    first = workers.reserve(0, 8)
    grown = workers.reserve(8, 12, generation=Generation(2), shards=first)
    assert ranges(grown) == [(0, 12)]
    assert grown[0].generation == 1


@pytest.mark.parametrize("is_named", [True, False], ids=["named by the map", "not named"])
def test_a_take_over_forgets_the_generation_of_an_earlier_life(is_named: bool) -> None:
    """A worker at which an earlier life here had room, but nothing certain, has nothing to adopt: room there
    is asked for under the new generation, since the old one is fenced, and the old room is free.
    """
    workers = Workers(4)
    placed = workers.reserve(0, 8)
    if is_named:
        workers.rooms.adopt(KEY, Generation(2), [1, 2, 3], [item.shard for item in placed])
    else:
        workers.rooms.adopt(KEY, Generation(2), [1, 2, 3], [])
        workers.stores[0].adopt(KEY, Generation(2), [1, 2, 3])
    assert workers.held() == [0]
    again = workers.reserve(0, 4, generation=Generation(2))
    assert [item.generation for item in again] == [2]


def test_a_sequence_owned_by_another_is_fenced() -> None:
    """A lower generation than a worker knows is an error, not a refusal."""
    workers = Workers(4)
    workers.stores[0].reserve(KEY, Generation(5), 0, 4)
    with pytest.raises(Fenced):
        workers.reserve(0, 4)


def test_renouncing_tells_whether_the_sequence_is_anothers() -> None:
    """Giving back what is ours succeeds; where another dense worker took over it is Fenced."""
    workers = Workers(4)
    workers.reserve(0, 4)
    workers.rooms.renounce(KEY, workers.taken(WorkerId("w0")))
    assert workers.held() == [0]
    workers.reserve(0, 4, generation=Generation(2))
    workers.stores[0].adopt(KEY, Generation(9), ())
    ours = workers.taken(WorkerId("w0"))
    with pytest.raises(Fenced):
        workers.rooms.renounce(KEY, ours)


def test_what_a_new_life_will_hold_is_not_given_up_with_the_old() -> None:
    """After a loss what the worker held under the generation that is void is taken; a copy that is expected
    at its next life, under a higher one, stays: to release it would fence that generation.
    """
    workers = Workers(4)
    (lost,) = workers.reserve(0, 4)
    target = lost.shard.worker, Epoch(9)
    wanted = PullWanted(KEY, Generation(2), 0, (1, 2), ShardPrefix(), lost, target, begins=True)
    workers.rooms.expect_pull(wanted)
    assert workers.holders.take_void(KEY, lost.shard.worker, lost.generation) is None
    assert workers.taken(lost.shard.worker) == Held(*target, Generation(2), is_granted=False)
    workers.holders.put(KEY, Held(lost.shard.worker, lost.shard.epoch, lost.generation))
    assert workers.holders.take_void(KEY, lost.shard.worker, lost.generation) is not None


@pytest.mark.parametrize(
    ("differs_at", "kept"),
    [(None, [(0, 8), (8, 16)]), (3, [(0, 3)]), (0, []), (8, [(0, 8)]), (11, [(0, 8), (8, 11)])],
)
def test_a_difference_at_one_worker_voids_what_lies_behind_it_at_others(
    differs_at: int | None, kept: list[tuple[int, int]]
) -> None:
    """Each worker confirms its own tokens; keys and values behind a token that differs are wrong wherever
    they lie, and given back.
    """
    workers = Workers(4, 4)
    workers.computed(workers.reserve(0, 16))
    token_ids = [-1 if position == differs_at else position for position in range(16)]
    assert list(workers.rooms.adopt(KEY, Generation(2), token_ids, None).committed) == kept
    assert [store.holdings() != () for store in workers.stores] == [len(kept) > 0, len(kept) > 1]


def test_a_lease_that_ended_behind_a_copy_is_no_other_worker() -> None:
    """Where the copy is given back its worker says that it holds no more, and is forgotten; the map still
    names a shard there, which is lost, and the sequence goes on elsewhere.
    """
    workers = Workers(4, 4)
    (kept,) = workers.reserve(0, 8)
    worker = WorkerId("w1") if kept.shard.worker == "w0" else WorkerId("w0")
    (grown,) = workers.reserve(8, 12, shards=(kept,))
    assert grown.shard.worker == worker
    store = next(store for store in workers.stores if store.worker == worker)
    copy = Placed(store.reserve(KEY, ONE, 0, 4, apart=True).shard, ONE)
    store.release(KEY, ONE)
    workers.rooms.release_shard(KEY, copy)
    assert workers.holders.get(KEY, worker) is None
    granted = workers.reserve(12, 16, shards=(kept, grown))
    assert workers.over == [(worker, ONE)]
    assert {placed.shard.worker for placed in granted} <= {kept.shard.worker}


def test_a_lease_that_is_over_is_no_other_worker() -> None:
    """More is asked for where the lease ended unheard: that is told, and room comes under the next life. A
    new request with the id of one that was just released is refused, as before.
    """
    workers = Workers(4)
    assert ranges(workers.reserve(0, 8)) == [(0, 8)]
    workers.clock.advance(1.5)
    workers.stores[0].expire()
    assert workers.reserve(8, 12) == ()
    assert workers.over == [(WorkerId("w0"), ONE)]
    assert ranges(workers.reserve(0, 8, Generation(2))) == [(0, 8)]
    other = Workers(4)
    other.stores[0].adopt(KEY, ONE, ())
    other.stores[0].release(KEY, ONE, 0)
    with pytest.raises(LeaseOver):
        other.reserve(0, 8)
    assert other.over == []


class LatePeer(LocalPeer):
    """Adopts, and its answer comes too late, so many times."""

    def __init__(self, store: Store, late: int) -> None:
        super().__init__(store, _no_session)
        self.late = late

    def adopt(self, key: SequenceKey, generation: Generation, token_ids: Sequence[int]) -> Adoption:
        """See `AttentionPeer.adopt`."""
        adoption = super().adopt(key, generation, token_ids)
        self.late -= 1
        if self.late >= 0:
            raise DeadlineExceeded("no answer within 3 s")
        return adoption


@pytest.mark.parametrize(("late", "kept"), [(1, [(0, 8), (8, 16)]), (2, [(8, 16)])])
def test_a_worker_that_is_late_is_asked_once_more(late: int, kept: list[tuple[int, int]]) -> None:
    """What a worker has may be most of a prompt: one answer that is late is not taken for nothing."""
    workers = Workers(4, 4)
    workers.computed(workers.reserve(0, 16))
    member = AttentionMember(WorkerId("w0"), Epoch(1), "", 4, 4)
    workers.members.connected(member, LatePeer(workers.stores[0], late))
    assert list(workers.rooms.adopt(KEY, Generation(2), range(16), None).committed) == kept


@pytest.mark.parametrize("split", [None, 4], ids=["whole", "its beginning"])
def test_a_shard_that_moved_since_the_map_is_found(split: int | None) -> None:
    """A map from before a move names the source, which has nothing of it any more, or the rest: every worker
    is asked, and all that was computed is found.
    """
    workers = Workers(4, 4, 4)
    before = workers.reserve(0, 16)
    workers.computed(before)
    (first, _), target = before, workers.stores[2]
    moved_end = first.shard.end if split is None else split
    workers.computed([Placed(target.reserve(KEY, ONE, 0, moved_end).shard, ONE)])
    if split is None:
        workers.rooms.release_shard(KEY, first)
    else:
        workers.rooms.trim(KEY, [first.shard.worker], split)
    adopted = workers.rooms.adopt(KEY, Generation(2), range(16), [placed.shard for placed in before])
    assert join(adopted.committed) == ((0, 16),)
    assert workers.held() == [0 if split is None else 1, 2, 2 if split is None else 1]


def test_a_new_life_replaces_the_old_one() -> None:
    """Membership names another epoch: the old life's peer is to be closed, and is usable no more."""
    workers = Workers(4)
    (over,) = workers.members.update([AttentionMember(WorkerId("w0"), Epoch(77), "", 4, 4)])
    assert over[:2] == ("w0", Epoch(1))
    assert workers.members.peer(WorkerId("w0"), Epoch(1)) is None
    assert not workers.members.all_usable()
    assert [member.epoch for member in workers.members.due(0.0, 1.0)] == [77]
    assert workers.members.due(0.5, 1.0) == []


def test_breaks_of_one_life_double_the_pause() -> None:
    """A worker whose lane breaks again and again is tried ever more seldom, and half a minute at most."""
    workers = Workers(4)
    member = workers.members
    pauses: list[int] = []
    now_s = 0.0
    for _ in range(12):
        peer = member.disconnect(WorkerId("w0"), Epoch(1), now_s)
        assert peer is not None
        began_s = now_s
        while not (due := member.due(now_s, 1.0)):
            now_s += 0.05
        pauses.append(round(now_s - began_s))
        member.connected(due[0], peer)
    assert pauses == sorted(pauses)
    assert pauses[0] == 0
    assert pauses[-1] == 30


def test_breaks_long_ago_do_not_count() -> None:
    """A worker that broke often, and then was usable for a minute, is tried again soon."""
    members = Workers(4).members
    worker, epoch, now_s = WorkerId("w0"), Epoch(1), 0.0
    pauses: list[float] = []
    for usable_s in (1.0, 1.0, 50.0, 70.0):
        peer = members.disconnect(worker, epoch, now_s)
        assert peer is not None
        began_s = now_s
        while not (due := members.due(now_s, 0.5)):
            now_s += 0.1
        pauses.append(round(now_s - began_s, 1))
        members.connected(due[0], peer)
        now_s += usable_s
    members.disconnect(worker, epoch, now_s)
    assert pauses == [0.1, 0.2, 0.4, 0.8]
    assert members.due(now_s + 0.1, 0.5) != []


def test_holders_know_what_to_renew_and_what_to_release() -> None:
    """A sequence is renewed at a life of a worker exactly while something of it is held there."""
    holders = Holders()
    here, there = WorkerId("w0"), WorkerId("w1")
    holders.put(KEY, Held(here, Epoch(1), ONE))
    holders.put(KEY, Held(there, Epoch(2), ONE))
    assert holders.of_worker(here, Epoch(1)) == {KEY: 1}
    assert holders.of_worker(here, Epoch(9)) == {}
    holders.forget_life(here, Epoch(1))
    assert holders.of_worker(here, Epoch(1)) == {}
    assert holders.take(KEY) == (Held(there, Epoch(2), ONE),)
    assert holders.take(KEY) == ()


def test_a_resubmission_outranks_every_life_before() -> None:
    """Wire generations order by the gateway's generation first, then by our own fresh starts."""
    generations = [wire_generation(g, life) for g in (1, 2, 65_535) for life in (0, 1, 65_535)]
    assert generations == sorted(set(generations))
    assert generations[-1] < 2**32


@pytest.fixture(name="inbox")
def _inbox() -> Inbox:
    """An inbox that takes two offers."""
    return Inbox(offers_most=2)


def test_an_inbox_keeps_order_and_refuses_when_full(inbox: Inbox) -> None:
    """Offers beyond the bound wait and are refused in time; answers always enter; all run in order."""
    done: list[int] = []
    inbox.offer(lambda: done.append(0), 0.0)
    inbox.offer(lambda: done.append(1), 0.0)
    with pytest.raises(Unavailable):
        inbox.offer(lambda: done.append(9), 0.01)
    inbox.post(lambda: done.append(2))
    assert inbox.run(most=2, budget_s=1.0) == 2
    assert inbox.run(most=2, budget_s=1.0) == 1
    assert done == [0, 1, 2]


def test_an_offer_waits_for_room(inbox: Inbox) -> None:
    """A full inbox takes an offer as soon as a call was done."""
    done: list[int] = []
    for number in range(2):
        inbox.offer(partial(done.append, number), 0.0)
    third = threading.Thread(target=lambda: inbox.offer(lambda: done.append(2), 10.0))
    third.start()
    while len(done) < 3:
        inbox.wait(1.0)
        inbox.run(most=1, budget_s=1.0)
    third.join(1.0)
    assert done == [0, 1, 2]
