"""What a dense worker's pool does by itself: connects, renews, and asks again who refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any, cast

import pytest

from cluster.clock import ManualClock
from cluster.errors import AnabranchError, DeadlineExceeded, Fenced, ResourceExhausted, Unavailable
from cluster.policies.placement import PlacementPolicy
from cluster.types import Epoch, Generation, SequenceKey, ShardId, ShardRef, WorkerId
from tests.attention_builders import LEASE_MS, build_geometry, build_store
from workers.attention.local_peer import LocalPeer
from workers.dense.members import AttentionMember
from workers.dense.pool import Pool
from workers.dense.prefixes import BlockChain
from workers.dense.rooms import PullWanted, RoomWanted
from workers.dense.sequences import Placed
from workers.lanes.messages import Lane
from workers.peer import Acquisition, HeldShard, PullSource, Reservation, ShardPrefix

BLOCK = 4
KEY = SequenceKey("request")
ONE = Generation(1)
Answer = tuple[Placed, ...] | AnabranchError


class AtOnce(Executor):
    """Runs every call where it is submitted."""

    def submit(self, call: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        """See `Executor`."""
        done: Future[Any] = Future()
        done.set_result(call(*given, **named))
        return done


class Peer(LocalPeer):
    """An attention worker that fails a call when it is told to, and takes copies from nobody."""

    def __init__(self) -> None:
        self.store = build_store(blocks=8)
        super().__init__(self.store, lambda: pytest.fail("no lane of this is asked"))
        self.failures: list[Exception] = []
        self.reserves = self.closes = 0
        self.during_pull: Callable[[], object] = lambda: None

    def reserve(
        self, key: SequenceKey, generation: Generation, first: int, end: int, prefix: ShardPrefix
    ) -> Reservation:
        """See `AttentionPeer`."""
        self.reserves += 1
        self._fail()
        return super().reserve(key, generation, first, end, prefix)

    def pull(
        self,
        key: SequenceKey,
        generation: Generation,
        first: int,
        token_ids: Sequence[int],
        prefix: ShardPrefix,
        source: PullSource,
    ) -> Acquisition:
        """See `AttentionPeer`."""
        self.during_pull()
        end = first + len(token_ids)
        shard = self.store.reserve(key, generation, first, end, prefix).shard
        return Acquisition(HeldShard(shard, end - first, 1, generation), self.store.available)

    def open_lane(self) -> Lane:
        """See `AttentionPeer`."""
        self._fail()
        return cast(Lane, object())

    def close(self) -> None:
        """See `AttentionPeer`."""
        self.closes += 1

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.pop()


class Tended:
    """A pool over one attention worker whose calls run at once; it is also the listener."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.peer = Peer()
        self.failures: list[Exception] = []
        """Of attempts to connect."""
        self.ready: list[WorkerId] = []
        self.lost: list[SequenceKey] = []
        policy = PlacementPolicy(block_tokens=BLOCK, shard_tokens=64, max_shards=8)
        self.pool = Pool(
            policy, self.connect, self, LEASE_MS, None, self.clock, executors=lambda _threads, _name: AtOnce()
        )
        self.member = AttentionMember(self.peer.worker, self.peer.epoch, "host:1", 8, 8)
        self.pool.update([self.member])

    def connect(self, _member: AttentionMember) -> Peer:
        """See `Connect`."""
        if self.failures:
            raise self.failures.pop()
        return self.peer

    def pass_time(self, seconds: float) -> None:
        """Time goes by, and the pool looks after itself."""
        self.clock.advance(seconds)
        self.pool.tend()

    def reserve(self) -> Answer:
        """A block for `KEY`: what the pool answers."""
        answers: list[Answer] = []
        chain = BlockChain(build_geometry(block_tokens=BLOCK), "")
        self.pool.reserve(RoomWanted(KEY, ONE, chain, 0, BLOCK, ()), answers.append)
        (answer,) = answers
        return answer

    def pull(self) -> Placed | AnabranchError | None:
        """A copy of a block for `KEY`: what the pool answers."""
        answers: list[Placed | AnabranchError | None] = []
        target = self.member.worker, self.member.epoch
        source = Placed(ShardRef(*target, ShardId(99), 0, BLOCK), ONE)
        wanted = PullWanted(KEY, ONE, 0, (1, 2, 3, 4), ShardPrefix(), source, target, begins=True)
        self.pool.pull(wanted, answers.append)
        (answer,) = answers
        return answer

    def peer_ready(self, member: AttentionMember, lane: Lane) -> None:
        """See `PoolListener`."""
        self.ready.append(member.worker)

    def peer_gone(self, worker: WorkerId, epoch: Epoch) -> None:
        """See `PoolListener`."""

    def lease_lost(self, key: SequenceKey, worker: WorkerId, generation: Generation) -> None:
        """See `PoolListener`."""
        self.lost.append(key)

    def superseded(self, key: SequenceKey, generation: Generation, error: Fenced) -> None:
        """See `PoolListener`."""


@pytest.mark.parametrize(
    ("error", "looks_s"),
    [
        (Unavailable("connection reset"), [0.5]),
        (ResourceExhausted("no room"), [0.5]),
        (DeadlineExceeded("no answer"), [0.5, 14.9, 0.1]),
    ],
)
def test_who_refused_is_asked_again_though_membership_says_nothing_new(
    error: AnabranchError, looks_s: list[float]
) -> None:
    """A reservation fails: nobody is placed there for the moment. In a quiet cluster no heartbeat says
    otherwise, and the pool asks again all the same; later where sequences would stand for it.
    """
    tended = Tended()
    tended.pool.tend()
    tended.peer.failures = [error]
    assert [tended.reserve() for _ in range(3)] == [(), (), ()]
    for pause_s in looks_s:
        assert tended.reserve() == ()
        assert tended.peer.reserves == 1
        tended.pass_time(pause_s)
    answer = tended.reserve()
    assert isinstance(answer, tuple)
    assert [placed.shard.end for placed in answer] == [BLOCK]


@pytest.mark.parametrize("where", ["connect", "open a lane"])
def test_a_connection_that_fails_in_an_unforeseen_way_is_tried_again(where: str) -> None:
    """An error that is none of the tree ends one attempt, whose connection is closed, and not all of them."""
    tended = Tended()
    failing = tended if where == "connect" else tended.peer
    failing.failures = [ValueError("no such address")]
    tended.pool.tend()
    assert tended.ready == []
    assert tended.peer.closes == (where != "connect")
    tended.pass_time(0.5)
    assert tended.ready == [tended.member.worker]


def test_what_is_only_asked_for_is_not_renewed() -> None:
    """Leases are renewed while a copy is under way, before its worker knows the sequence: that is no lost
    lease. Once it came it is renewed with the rest.
    """
    tended = Tended()
    tended.pool.tend()
    tended.peer.during_pull = lambda: tended.pass_time(LEASE_MS / 1000)
    copy = tended.pull()
    assert isinstance(copy, Placed)
    assert tended.lost == []
    tended.peer.store.release_shard(KEY, ONE, copy.shard.shard)
    tended.pass_time(LEASE_MS / 1000)
    assert tended.lost == [KEY]
