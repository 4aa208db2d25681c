"""The KV pool as one dense worker uses it: rooms, connections and leases, off the engine's thread."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

from cluster.clock import Clock, monotonic
from cluster.errors import AnabranchError, Fenced, Internal
from cluster.policies.placement import PlacementPolicy, inadmissible
from cluster.policies.prefixes import Find, blocks_known, go_on
from cluster.telemetry import logger
from cluster.types import Epoch, Generation, SequenceKey, ShardRef, WorkerId
from workers.dense.holders import Holders
from workers.dense.members import AttentionMember, Connect, MemberTable
from workers.dense.rooms import Adopted, PrefixWanted, PullWanted, Rooms, RoomWanted
from workers.dense.sequences import Placed
from workers.lanes.messages import Lane
from workers.peer import AttentionPeer

_log = logger("dense.pool")
_T = TypeVar("_T")

_KEY_THREADS = 4
_CONNECT_THREADS = 4
_PULL_THREADS = 2
_TEND_S = 0.5
"""How often the pool looks after itself; a worker that could not be connected to is tried again then."""

_RENEW_KEYS_MOST = 1024
"""Sequences named in one call to renew."""


Executors = Callable[[int, str], Executor]
"""Makes an executor of so many threads, called so; one of a single thread keeps the order of its calls."""


class PoolListener(Protocol):
    """What the pool tells the engine; called on the pool's threads, must not block."""

    def peer_ready(self, member: AttentionMember, lane: Lane) -> None:
        """A lane to a life of a worker is open."""
        ...

    def peer_gone(self, worker: WorkerId, epoch: Epoch) -> None:
        """A life of a worker is over."""
        ...

    def lease_lost(self, key: SequenceKey, worker: WorkerId, generation: Generation) -> None:
        """A worker no longer holds what it held of a sequence."""
        ...

    def superseded(self, key: SequenceKey, generation: Generation, error: Fenced) -> None:
        """Somebody else runs the sequence under a higher generation than this one."""
        ...


class Pool:
    """Every answer comes through a callback, on one of the pool's threads.

    Calls about one sequence run in order on one thread (chosen by its key): a release comes after the
    reservation it undoes, a reservation after the release that made place for it. Their queues are
    bounded by what the engine asks: a few calls per live sequence.
    """

    def __init__(
        self,
        policy: PlacementPolicy,
        connect: Connect,
        listener: PoolListener,
        lease_ms: int,
        find: Find | None = None,
        clock: Clock = monotonic,
        executors: Executors = ThreadPoolExecutor,
    ) -> None:
        """`find` asks the directory; without it only prefixes seen here are known."""
        self.members = MemberTable()
        self._holders = Holders()
        self._policy = policy
        self._rooms = Rooms(self.members, self._holders, policy, listener.lease_lost)
        self._find = find
        self._connect = connect
        self._listener = listener
        self._clock = clock
        self._renew_pause_s = lease_ms / 4000
        self._renew_s = clock() + self._renew_pause_s
        self._by_key = [executors(1, f"pool-{index}") for index in range(_KEY_THREADS)]
        self._connectors = executors(_CONNECT_THREADS, "connect")
        self._pullers = executors(_PULL_THREADS, "pull")
        self._connected = threading.Condition()
        self._closing = False
        self._wake = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="pool-keeper", daemon=True)

    def start(self) -> None:
        """Begin to connect and to renew."""
        self._keeper.start()

    def close(self) -> None:
        """Finish what was asked, then give up all connections; leases run out on their own. Idempotent."""
        self._closing = True
        self._wake.set()
        if self._keeper.is_alive():
            self._keeper.join()
        for executor in (*self._by_key, self._pullers, self._connectors):
            executor.shutdown(wait=True)
        for peer in self.members.clear():
            peer.close()

    def update(self, members: Sequence[AttentionMember]) -> None:
        """Membership changed: connect to new lives, give up those that are over. Does not wait for either."""
        for worker, epoch, peer in self.members.update(members):
            self._holders.forget_life(worker, epoch)
            self._listener.peer_gone(worker, epoch)
            if peer is not None:
                self._later(self._connectors, peer.close)
        self._wake.set()

    def wait_connected(self, timeout_s: float) -> bool:
        """Until every worker named by membership is usable; False after `timeout_s`."""
        with self._connected:
            return self._connected.wait_for(self.members.all_usable, timeout_s)

    def broken(self, worker: WorkerId, epoch: Epoch) -> None:
        """The lane to a life of a worker broke. It is connected again if it still lives."""
        peer = self.members.disconnect(worker, epoch, self._clock())
        if peer is not None:
            self._later(self._connectors, peer.close)

    @property
    def can_ask(self) -> bool:
        """Whether there is a directory to ask."""
        return self._find is not None

    def inadmissible(self, tokens: int) -> str | None:
        """Why a sequence of so many tokens cannot fit the workers now known; None if it can."""
        spaces = self.members.spaces(self._policy.block_tokens, usable=False)
        return inadmissible(tokens, spaces, self._policy)

    def has_room_for(self, tokens: int) -> bool:
        """Whether the workers now usable could hold a sequence of so many tokens, were they empty."""
        spaces = self.members.spaces(self._policy.block_tokens)
        return inadmissible(tokens, spaces, self._policy) is None

    def reserve(
        self, wanted: RoomWanted, answer: Callable[[tuple[Placed, ...] | AnabranchError], None]
    ) -> None:
        """Reserve as much of a range as there is room for, from its start; answers the shards concerned
        with their whole ranges, none of them when there is no room, or Fenced.
        """
        self._in_order(wanted.key, lambda: answer(_answered(lambda: self._rooms.reserve(wanted))))

    def acquire(self, wanted: PrefixWanted, answer: Callable[[Adopted | AnabranchError], None]) -> None:
        """Pin what lies in the pool of a new sequence's prefix; answers what was found, or Fenced."""
        self._in_order(
            wanted.key, lambda: answer(_answered(lambda: self._rooms.acquire(self._looked_up(wanted))))
        )

    def adopt(
        self,
        key: SequenceKey,
        generation: Generation,
        token_ids: Sequence[int],
        shard_map: Sequence[ShardRef] | None,
        answer: Callable[[Adopted | AnabranchError], None],
    ) -> None:
        """Take over what lies at the workers of a map, or without one at every worker; answers what
        survives, or Fenced.
        """
        self._in_order(
            key,
            lambda: answer(_answered(lambda: self._rooms.adopt(key, generation, token_ids, shard_map))),
        )

    def pull(self, wanted: PullWanted, answer: Callable[[Placed | AnabranchError | None], None]) -> None:
        """Copy a piece of a shard to another worker; answers the copy so far. On threads of their own: a copy
        may take long, and what other sequences ask for must not wait for it.
        """
        expected = self._rooms.expect_pull(wanted)
        self._later(self._pullers, lambda: answer(_answered(lambda: self._rooms.pull(expected))))

    def release_shard(self, key: SequenceKey, placed: Placed) -> None:
        """Give back one shard of a sequence that goes on; see `Rooms.release_shard`."""
        self._in_order(key, lambda: self._rooms.release_shard(key, placed))

    def release(self, key: SequenceKey, computed_end: int = 0) -> None:
        """Give back all room of a sequence. Where no step of it is under way, positions before `computed_end`
        were computed and may serve others.
        """
        self._in_order(key, lambda: self._rooms.release(key, computed_end))

    def trim(self, key: SequenceKey, workers: Iterable[WorkerId], keep_from: int) -> None:
        """Give back what lies at these workers before a position that no row will see any more."""
        self._in_order(key, lambda: self._rooms.trim(key, workers, keep_from))

    def abandon(self, key: SequenceKey) -> None:
        """Renew it no longer and free nothing: somebody may take it over until its leases end."""
        self._in_order(key, lambda: self._rooms.abandon(key))

    def renounce(self, key: SequenceKey, worker: WorkerId, void: Generation) -> None:
        """Give back what one worker holds of a sequence under `void` or a lower generation, after a fault
        there; tells the listener if the sequence turns out to be another's. What is expected there under a
        higher generation, of a copy that begins meanwhile, say, is none of it.
        """

        def renounce() -> None:
            held = self._holders.take_void(key, worker, void)
            if held is None:
                return
            try:
                self._rooms.renounce(key, held)
            except Fenced as error:
                self._listener.superseded(key, held.generation, error)

        self._in_order(key, renounce)

    def tend(self) -> float:
        """Connect where membership names a life without a lane; let those be asked again who refused; renew
        leases before they end. Returns after how many seconds to look again.
        """
        self.members.forget_refusals(self._clock())
        for member in self.members.due(self._clock(), _TEND_S):
            self._later(self._connectors, partial(self._open, member))
        if self._clock() >= self._renew_s:
            self._renew_s = self._clock() + self._renew_pause_s
            for peer in self.members.peers():
                self._later(self._connectors, partial(self._renew, peer))
        return min(_TEND_S, max(0.0, self._renew_s - self._clock()))

    def _looked_up(self, wanted: PrefixWanted) -> PrefixWanted:
        """With what the directory knows beyond the sources given."""
        if self._find is None or not wanted.asks:
            return wanted
        size = wanted.chain.block_tokens
        known = blocks_known(wanted.sources, size)
        runs = self._find(wanted.chain.hashes[known:], known)
        sources = go_on(wanted.sources, runs, size, self.members.is_usable, _number(wanted.key))
        return replace(wanted, sources=sources)

    def _in_order(self, key: SequenceKey, call: Callable[[], None]) -> None:
        self._later(self._by_key[_number(key) % _KEY_THREADS], call)

    def _later(self, executor: Executor, call: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                call()
            except Exception as error:  # noqa: BLE001  a bug must be seen, and not end in a future nobody reads
                _log.error("pool_call_failed", error=error)

        if not self._closing:
            executor.submit(guarded)

    def _keep(self) -> None:
        while not self._closing:
            self._wake.wait(self.tend())
            self._wake.clear()

    def _open(self, member: AttentionMember) -> None:
        opened = _answered(lambda: self._opened(member))
        if isinstance(opened, AnabranchError):
            _log.warning("connect_failed", peer=member.worker, address=member.address, problem=opened.message)
            self.members.connected(member, None)
            return
        peer, lane = opened
        if self.members.connected(member, peer):
            _log.info("peer_ready", peer=member.worker, peer_epoch=f"{member.epoch:016x}")
            self._listener.peer_ready(member, lane)
            with self._connected:
                self._connected.notify_all()
        else:
            lane.close()
            peer.close()

    def _opened(self, member: AttentionMember) -> tuple[AttentionPeer, Lane]:
        peer = self._connect(member)
        try:
            return peer, peer.open_lane()
        except BaseException:
            peer.close()
            raise

    def _renew(self, peer: AttentionPeer) -> None:
        generations = self._holders.of_worker(peer.worker, peer.epoch)
        keys = list(generations)
        for start in range(0, len(keys), _RENEW_KEYS_MOST):
            try:
                unknown = peer.renew(keys[start : start + _RENEW_KEYS_MOST])
            except AnabranchError as error:
                _log.warning("renew_failed", peer=peer.worker, problem=error.message)
                return
            for key in unknown:
                self._listener.lease_lost(key, peer.worker, generations[key])


def _number(key: SequenceKey) -> int:
    """The same for a key in every process."""
    return zlib.crc32(str(key).encode())


def _answered(call: Callable[[], _T]) -> _T | AnabranchError:
    """A call's result, or the error that becomes its answer: an answer always comes."""
    try:
        return call()
    except AnabranchError as error:
        return error
    except Exception as error:  # noqa: BLE001  whoever asked waits for an answer, whatever happened
        _log.error("pool_call_failed", error=error)
        return Internal(f"the KV pool's client failed: {type(error).__name__}: {error}")
