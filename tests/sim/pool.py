"""Attention workers whose store, arena and kernel are real, and the way to them, which is not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from anabranch.v1 import inference_pb2
from cluster.config import AttentionConfig
from cluster.errors import AnabranchError, DeadlineExceeded, LaneBroken, Unavailable
from cluster.types import Epoch, Generation, KvGeometry, SequenceKey, WorkerId
from tests.sim.watch import Watch
from tests.sim.world import SimulatedProcess, World
from workers.attention.arena import Arena
from workers.attention.journal import Journal
from workers.attention.kv_service import account_message
from workers.attention.local_peer import LocalPeer
from workers.attention.session import AttendSession
from workers.attention.shard_blocks import Sharing
from workers.attention.store import Store
from workers.attention.transfer import Copy, Piece, fetch, pull
from workers.kernels.reference import ReferenceKernel
from workers.lanes.answer import answer
from workers.lanes.inproc import InProcessLane
from workers.lanes.messages import LayerMessage, PartialReply
from workers.lanes.plans import PlanDecoder
from workers.peer import Acquisition, PullSource, ShardPrefix

_T = TypeVar("_T")

LOST_ANSWER = 0.01
LOST_CALL = 0.005
BROKEN_LANE = 0.0005
DAMAGED_PIECE = 0.03
LATE_CALL = 0.5
"""Of the calls that a frozen worker was sent: those it serves when it goes on, for nobody."""


class SimulatedAttention(SimulatedProcess):
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
        super().__init__(world, worker, epoch)
        self.worker = worker
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
        return self.life

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
        self.watch = Watch()
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
        """The worker at an address, frozen or not. Raises Unavailable."""
        found = self.attention.get(address)
        if found is None or not found.alive or not self.passes(caller, found.worker):
            raise Unavailable(f"{address} does not answer {caller}")
        return found


class SimulatedPeer:
    """An `AttentionPeer` over a network that loses calls, and answers; those not below are `LocalPeer`'s.
    What a frozen worker was asked it may do later, when nobody waits for it any more.
    """

    def __init__(self, network: Network, caller: SimulatedProcess, target: SimulatedAttention) -> None:
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
            holder = self._network.reach(target.name, source.address)
            _require_answers(holder)
            pieces = fetch(holder.store, holder.arena, source.shard.shard, source.generation, start, copy.end)
            for piece in pieces:
                yield self._on_its_way(piece)

        return self._call(lambda: pull(target.store, target.arena, copy, fetched))

    def renew(self, keys: Iterable[SequenceKey]) -> tuple[SequenceKey, ...]:
        """See `AttentionPeer`."""
        named = tuple(keys)
        self._network.watch.renewed.update(named)
        return self._call(lambda: self._local.renew(named))

    def open_lane(self) -> SimulatedLane:
        """See `AttentionPeer`."""
        return self._call(lambda: SimulatedLane(self._network, self._caller, self._target))

    def close(self) -> None:
        """See `AttentionPeer`."""

    def _call(self, call: Callable[[], _T]) -> _T:
        world, caller, target = self._network.world, self._caller.name, self._target
        self._network.reach(caller, target.address)
        if world.chance(LOST_CALL):
            raise Unavailable(f"a call of {caller} to {self.worker} was lost")
        if not target.answers and world.chance(LATE_CALL):
            target.when_awake(lambda: world.after(world.latency(), lambda: self._serve_late(call)))
        _require_answers(target)
        result = call()
        if world.chance(LOST_ANSWER):
            raise Unavailable(f"an answer of {self.worker} to {caller} was lost")
        return result

    def _serve_late(self, call: Callable[[], object]) -> None:
        if self._target.alive:
            with contextlib.suppress(AnabranchError):
                call()

    def _on_its_way(self, piece: Piece) -> Piece:
        if not self._network.world.chance(DAMAGED_PIECE):
            return piece
        damaged = bytearray(piece.payload)
        damaged[self._network.world.rng.randrange(len(damaged))] ^= 0x40
        return replace(piece, payload=bytes(damaged))


class SimulatedLane:
    """A `Lane` that may break at any message; those a frozen worker was sent reach it when it goes on."""

    def __init__(self, network: Network, caller: SimulatedProcess, target: SimulatedAttention) -> None:
        self._network = network
        self._caller = caller
        self._target = target
        self._session = target.session()
        self._inner = InProcessLane(self._session, on_close=lambda: None)
        self._decoder = PlanDecoder()
        self._late = 0
        self._is_shut = False

    def send(self, message: LayerMessage) -> None:
        """See `Lane`."""
        self._pass()
        if message.plan is not None:
            with contextlib.suppress(AnabranchError):
                rows = self._decoder.decode(message.micro_batch, message.plan)
                self._network.watch.writes(self._caller.life, self._target.address, rows)
        if self._target.answers:
            if self._late:
                raise LaneBroken("what was sent before has not been replied to")
            self._inner.send(message)
        else:
            self._late += 1
            self._target.when_awake(lambda: self._arrive(message))

    def receive(self, step: int, micro_batch: int, layer: int, deadline_s: float) -> PartialReply:
        """See `Lane`."""
        self._pass()
        return self._inner.receive(step, micro_batch, layer, deadline_s)

    def shut_down(self) -> None:
        """See `Lane`."""
        self._is_shut = True

    def close(self) -> None:
        """See `Lane`. What was sent before arrives all the same."""
        self._inner.close()

    def _arrive(self, message: LayerMessage) -> None:
        self._late -= 1
        answer(self._session, message)

    def _pass(self) -> None:
        try:
            self._network.reach(self._caller.name, self._target.address)
        except Unavailable as error:
            self._is_shut = True
            raise LaneBroken(error.message) from error
        if self._is_shut or self._network.world.chance(BROKEN_LANE):
            self._is_shut = True
            raise LaneBroken("the lane broke")


def _require_answers(worker: SimulatedAttention) -> None:
    """Raises DeadlineExceeded where it is frozen."""
    if not worker.answers:
        raise DeadlineExceeded(f"{worker.name} did not answer in time")
