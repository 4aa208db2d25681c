"""The attention workers a dense worker knows: their space, and connections to those that live."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf

from anabranch.v1 import inference_pb2
from cluster.config import Config
from cluster.errors import AnabranchError, DeadlineExceeded
from cluster.policies.instances import home_of
from cluster.policies.placement import WorkerSpace
from cluster.types import Epoch, WorkerId
from workers.peer import AttentionPeer

_SILENT_S = 15.0
"""How long a worker that let a reservation wait is not asked again, while membership says nothing of it."""


@dataclass(frozen=True, slots=True)
class AttentionMember:
    """An attention worker as membership tells it; blocks are those of its arena."""

    worker: WorkerId
    epoch: Epoch
    address: str
    blocks_capacity: int
    blocks_free: int
    is_admitting: bool = True
    """Not draining: new shards may go there."""
    is_local: bool = False
    is_home: bool = True
    """Of this dense worker's own instance."""
    tier: int = 0
    """Of its process's arenas, 0 the best."""


def attention_members(
    members: Iterable[inference_pb2.Member], dense: WorkerId, config: Config
) -> list[AttentionMember]:
    """The attention workers of a membership that a dense worker may use: those that left starting, and where
    instances are separate its own.
    """
    placement, replicas = config.placement, config.dense.replicas
    found = []
    for member in members:
        if member.role != inference_pb2.ROLE_ATTENTION or member.state == inference_pb2.MEMBER_STATE_STARTING:
            continue
        worker, blocks = WorkerId(member.worker_id), member.load.blocks
        is_home = placement.instances == "shared" or home_of(WorkerId(member.slot), replicas) == dense
        if is_home or placement.instances != "separate":
            found.append(
                AttentionMember(
                    worker,
                    Epoch(member.epoch),
                    member.address,
                    blocks.capacity,
                    blocks.free + blocks.sealed_cached,
                    is_admitting=member.state == inference_pb2.MEMBER_STATE_READY,
                    is_home=is_home,
                    tier=member.tier,
                )
            )
    return found


Connect = Callable[[AttentionMember], AttentionPeer]
"""Makes the peer of a member, without waiting for it."""


_RETRY_FIRST_S = 0.1
_RETRY_MOST_S = 30.0
_BREAKS_MOST = 16
_WELL_AGAIN_S = 60.0

EndedLife = tuple[WorkerId, Epoch, AttentionPeer | None]
"""A life that is over, and its connection to close."""


@dataclass(slots=True)
class _Known:
    member: AttentionMember
    blocks_free: int
    peer: AttentionPeer | None = None
    retry_s: float = 0.0
    rest_s: float | None = None
    """How long nobody is placed there after a refusal; None when it has not refused."""
    rests_until_s: float = inf
    is_connecting: bool = False
    breaks: int = 0


class MemberTable:
    """One entry per worker slot. Thread-safe; makes no calls while locked.

    named by membership --connect--> usable --broken--> named, again after a pause
          gone, or another epoch: the entry goes

    The pause doubles with each break of one life, so that a worker that answers but cannot keep up
    stalls a step now and then, not each second one (a circuit breaker). One that was usable for a minute
    begins with a short pause again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[WorkerId, _Known] = {}

    def update(
        self, members: Iterable[AttentionMember]
    ) -> list[tuple[WorkerId, Epoch, AttentionPeer | None]]:
        """Take what membership says; returns the lives that are over, with their peers to close.

        Local members are not the membership's to remove: they stay until `close`.
        """
        new = {member.worker: member for member in members}
        with self._lock:
            over = []
            for worker, known in list(self._known.items()):
                successor = new.get(worker)
                if successor is None and known.member.is_local:
                    continue
                if successor is None or successor.epoch != known.member.epoch:
                    del self._known[worker]
                    over.append((worker, known.member.epoch, known.peer))
            for worker, member in new.items():
                known = self._known.setdefault(worker, _Known(member, member.blocks_free))
                known.member, known.blocks_free, known.rest_s = member, member.blocks_free, None
            return over

    def due(self, now_s: float, retry_after_s: float) -> list[AttentionMember]:
        """Members to connect to now; each is named again after `retry_after_s` unless it became usable."""
        with self._lock:
            due = [
                known
                for known in self._known.values()
                if known.peer is None and not known.is_connecting and known.retry_s <= now_s
            ]
            for known in due:
                known.is_connecting, known.retry_s = True, now_s + retry_after_s
            return [known.member for known in due]

    def connected(self, member: AttentionMember, peer: AttentionPeer | None) -> bool:
        """An attempt ended; False when its life is over and the peer is to be closed."""
        with self._lock:
            known = self._known.get(member.worker)
            if known is None or known.member.epoch != member.epoch:
                return False
            known.is_connecting, known.peer = False, peer
            return True

    def disconnect(self, worker: WorkerId, epoch: Epoch, now_s: float) -> AttentionPeer | None:
        """The lane to this life broke: not usable until connected again; its peer, to be closed."""
        with self._lock:
            known = self._known.get(worker)
            if known is None or known.member.epoch != epoch:
                return None
            if known.peer is not None and now_s - known.retry_s >= _WELL_AGAIN_S:
                known.breaks = 0
            known.retry_s = now_s + min(_RETRY_FIRST_S * 2**known.breaks, _RETRY_MOST_S)
            known.breaks = min(known.breaks + 1, _BREAKS_MOST)
            peer, known.peer = known.peer, None
            return peer

    def peer(self, worker: WorkerId, epoch: Epoch) -> AttentionPeer | None:
        """The usable peer of this life, if there is one."""
        with self._lock:
            known = self._known.get(worker)
            return known.peer if known is not None and known.member.epoch == epoch else None

    def is_usable(self, worker: WorkerId, epoch: Epoch) -> bool:
        """Whether this life has a usable peer, and takes new sequences."""
        with self._lock:
            known = self._known.get(worker)
            if known is None or known.member.epoch != epoch:
                return False
            return known.peer is not None and known.member.is_admitting

    def remote_epoch(self, worker: WorkerId) -> Epoch | None:
        """The life of a worker outside this process that is known now."""
        with self._lock:
            known = self._known.get(worker)
            return None if known is None or known.member.is_local else known.member.epoch

    def address(self, worker: WorkerId, epoch: Epoch) -> str:
        """Where this life of a worker listens; empty when it is over."""
        with self._lock:
            known = self._known.get(worker)
            return known.member.address if known is not None and known.member.epoch == epoch else ""

    def draining(self) -> list[WorkerId]:
        """Workers outside this process that take nothing new."""
        with self._lock:
            return [
                worker
                for worker, known in sorted(self._known.items())
                if not known.member.is_admitting and not known.member.is_local
            ]

    def roomiest(self, apart_from: WorkerId, blocks: int) -> WorkerId | None:
        """Of the usable, admitting workers outside this process that have `blocks` free blocks: the one of
        the best tier, and of that the one that has most.
        """
        with self._lock:
            found = [
                (-known.member.tier, known.blocks_free, worker)
                for worker, known in self._known.items()
                if known.peer is not None and known.member.is_admitting and not known.member.is_local
                if worker != apart_from and known.blocks_free >= blocks
            ]
        return max(found)[-1] if found else None

    def peers(self) -> list[AttentionPeer]:
        """All usable peers, in the order of their names."""
        with self._lock:
            return [known.peer for _, known in sorted(self._known.items()) if known.peer is not None]

    def all_usable(self) -> bool:
        """Whether every known worker has a usable peer."""
        with self._lock:
            return all(known.peer is not None for known in self._known.values())

    def set_free(self, worker: WorkerId, epoch: Epoch, blocks: int) -> None:
        """What a reservation said, newer than the last heartbeat."""
        with self._lock:
            known = self._known.get(worker)
            if known is not None and known.member.epoch == epoch:
                known.blocks_free, known.rest_s = blocks, None

    def refused(self, worker: WorkerId, epoch: Epoch, error: AnabranchError) -> None:
        """It has no room, or does not answer: nobody is placed there for the moment. For longer where it was
        waited for: each attempt would take its whole deadline, and sequences stand meanwhile.
        """
        with self._lock:
            known = self._known.get(worker)
            if known is not None and known.member.epoch == epoch:
                known.blocks_free, known.rests_until_s = 0, inf
                known.rest_s = _SILENT_S if isinstance(error, DeadlineExceeded) else 0.0

    def forget_refusals(self, now_s: float) -> None:
        """Whoever has rested since it refused may be asked again: its last heartbeat's word counts, for
        membership says nothing new while nothing changes.
        """
        with self._lock:
            for known in self._known.values():
                if known.rest_s is None:
                    continue
                known.rests_until_s = min(known.rests_until_s, now_s + known.rest_s)
                if now_s >= known.rests_until_s:
                    known.rest_s = None
                    known.blocks_free = max(known.blocks_free, known.member.blocks_free)

    def add_free(self, worker: WorkerId, epoch: Epoch, blocks: int) -> None:
        """What a release gave back."""
        with self._lock:
            known = self._known.get(worker)
            if known is not None and known.member.epoch == epoch:
                known.blocks_free += blocks

    def spaces(self, block_tokens: int, *, usable: bool = True) -> list[WorkerSpace]:
        """Space for new shards where a peer is usable, or at every admitting member (`usable` False)."""
        with self._lock:
            return [
                WorkerSpace(
                    worker,
                    known.member.epoch,
                    free_tokens=known.blocks_free * block_tokens,
                    capacity_tokens=known.member.blocks_capacity * block_tokens,
                    is_local=known.member.is_local,
                    is_home=known.member.is_home,
                    tier=known.member.tier,
                )
                for worker, known in sorted(self._known.items())
                if known.member.is_admitting and (known.peer is not None or not usable)
            ]

    def used_share(self) -> float:
        """The share of all known blocks that is in use, 0 to 1."""
        with self._lock:
            capacity = sum(known.member.blocks_capacity for known in self._known.values())
            free = sum(known.blocks_free for known in self._known.values())
        return 1 - free / capacity if capacity else 0.0

    def clear(self) -> list[AttentionPeer]:
        """Forget everyone; the peers to close."""
        with self._lock:
            peers = [known.peer for known in self._known.values() if known.peer is not None]
            self._known.clear()
            return peers
