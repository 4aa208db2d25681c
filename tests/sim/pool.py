"""Attention workers whose store, arena and kernel are real, and the way to them, which is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from anabranch.v1 import inference_pb2
from cluster.config import AttentionConfig
from cluster.errors import LaneBroken, Unavailable
from cluster.types import Epoch, Generation, KvGeometry, SequenceKey, WorkerId
from tests.sim.world import World
from workers.attention.arena import Arena
from workers.attention.journal import Journal
from workers.attention.kv_service import account_message
from workers.attention.local_peer import LocalPeer
from workers.attention.session import AttendSession
from workers.attention.shard_blocks import Sharing
from workers.attention.store import Store
from workers.attention.transfer import Copy, Piece, fetch, pull
from workers.kernels.reference import ReferenceKernel
from workers.lanes.messages import Lane, LayerMessage, PartialReply
from workers.peer import Acquisition, PullSource, ShardPrefix

_T = TypeVar("_T")

LOST_ANSWER = 0.01
LOST_CALL = 0.005
BROKEN_LANE = 0.0005
DAMAGED_PIECE = 0.03


class SimulatedAttention:
    """One life of an attention worker."""

    def __init__(
        self,
        world: World,
        config: AttentionConfig,
        geometry: KvGeometry,
        worker: WorkerId,
        epoch: Epoch,
        blocks: int,
    ) -> None:
        self.worker, self.epoch = worker, epoch
        self.alive = True
        self.kernel = ReferenceKernel()
        self.arena = Arena(geometry, blocks, torch.device("cpu"), self.kernel.layout)
        self.journal = Journal()
        sharing = Sharing(self.arena.copy_block, self.journal) if config.prefix_sharing else None
        self.store = Store(
            worker, epoch, geometry, blocks, config.lease_ms, world.clock, sharing, last_layers_s=0.0
        )
        self._geometry = geometry
        self._slice_rows = config.slice_rows

    @property
    def address(self) -> str:
        """Where other workers find this life."""
        return f"{self.worker}@{self.epoch}"

    def session(self) -> AttendSession:
        """The attention side of a new lane."""
        return AttendSession(self.store, self.arena, self.kernel, self._slice_rows, lambda _seconds: None)

    def look_after(self) -> None:
        """What its thread does now and then."""
        self.store.expire()
        self.journal.holds(self.store.blocks_held())

    def load(self) -> inference_pb2.Load:
        """What heartbeats report."""
        return inference_pb2.Load(blocks=account_message(self.store.account(), self._geometry))


class Network:
    """Who reaches whom: everybody does, but for what is cut off."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.attention: dict[str, SimulatedAttention] = {}
        """Lives by address."""
        self._cut: dict[frozenset[str], float] = {}

    def cut(self, one: str, other: str, seconds: float) -> None:
        """No message passes between two names for a while."""
        self._cut[frozenset((one, other))] = self.world.now_s + seconds

    def heal(self) -> None:
        """All cuts end."""
        self._cut.clear()

    def passes(self, one: str, other: str) -> bool:
        """Whether messages pass."""
        return self._cut.get(frozenset((one, other)), 0.0) <= self.world.now_s

    def reach(self, caller: str, address: str) -> SimulatedAttention:
        """The worker at an address. Raises Unavailable."""
        found = self.attention.get(address)
        if found is None or not found.alive or not self.passes(caller, found.worker):
            raise Unavailable(f"{address} does not answer {caller}")
        return found


class SimulatedPeer:
    """An `AttentionPeer` over a network that loses calls, and answers; those not below are `LocalPeer`'s."""

    def __init__(self, network: Network, caller: str, target: SimulatedAttention) -> None:
        self.worker, self.epoch = target.worker, target.epoch
        self._network = network
        self._caller = caller
        self._target = target
        self._local = LocalPeer(target.store, target.session)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._local, name)
        return lambda *arguments: self._call(lambda: method(*arguments))

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
        copy = Copy(key, generation, first, token_ids, prefix, source.begins)
        target = self._target

        def fetched(start: int) -> Iterator[Piece]:
            holder = self._network.reach(target.worker, source.address)
            pieces = fetch(holder.store, holder.arena, source.shard.shard, source.generation, start, copy.end)
            for piece in pieces:
                yield self._on_its_way(piece)

        return self._call(lambda: pull(target.store, target.arena, copy, fetched))

    def open_lane(self) -> SimulatedLane:
        """See `AttentionPeer`."""
        world = self._network.world
        return self._call(lambda: SimulatedLane(world, self._local.open_lane(), self._require_way))

    def close(self) -> None:
        """See `AttentionPeer`."""

    def _require_way(self) -> None:
        self._network.reach(self._caller, self._target.address)

    def _call(self, call: Callable[[], _T]) -> _T:
        world = self._network.world
        self._require_way()
        if world.chance(LOST_CALL):
            raise Unavailable(f"a call of {self._caller} to {self.worker} was lost")
        answer = call()
        if world.chance(LOST_ANSWER):
            raise Unavailable(f"an answer of {self.worker} to {self._caller} was lost")
        return answer

    def _on_its_way(self, piece: Piece) -> Piece:
        if not self._network.world.chance(DAMAGED_PIECE):
            return piece
        damaged = bytearray(piece.payload)
        damaged[self._network.world.rng.randrange(len(damaged))] ^= 0x40
        return replace(piece, payload=bytes(damaged))


class SimulatedLane:
    """A `Lane` that may break at any message."""

    def __init__(self, world: World, inner: Lane, require_way: Callable[[], None]) -> None:
        self._world = world
        self._inner = inner
        self._require_way = require_way
        self._is_shut = False

    def send(self, message: LayerMessage) -> None:
        """See `Lane`."""
        self._pass()
        self._inner.send(message)

    def receive(self, step: int, micro_batch: int, layer: int, deadline_s: float) -> PartialReply:
        """See `Lane`."""
        self._pass()
        return self._inner.receive(step, micro_batch, layer, deadline_s)

    def shut_down(self) -> None:
        """See `Lane`."""
        self._is_shut = True

    def close(self) -> None:
        """See `Lane`."""
        self._inner.close()

    def _pass(self) -> None:
        try:
            self._require_way()
        except Unavailable as error:
            self._is_shut = True
            raise LaneBroken(error.message) from error
        if self._is_shut or self._world.chance(BROKEN_LANE):
            self._is_shut = True
            raise LaneBroken("the lane broke")
