"""Dense workers: real engines, each with the loop that is its thread's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from anabranch.v1 import control_pb2, inference_pb2
from anabranch.wire import sequence_key
from cluster.config import Config
from cluster.config_values import Serves
from cluster.policies.prefixes import Find
from cluster.types import Epoch, WorkerId
from tests.sim.pool import Network, SimulatedPeer
from tests.sim.sums import SumDecoder
from tests.sim.world import SimulatedExecutor, SimulatedProcess, World
from workers.dense.engine import Engine
from workers.dense.members import AttentionMember, attention_members
from workers.dense.model import Decoder
from workers.kernels.reference import ReferenceKernel
from workers.peer import AttentionPeer

_STEP_S = 0.02
_IDLE_S = 0.03


class SimulatedDense(SimulatedProcess):
    """One life of a dense worker: a real engine, and the loop that is its thread's."""

    def __init__(
        self,
        world: World,
        network: Network,
        config: Config,
        decoder: SumDecoder,
        name: str,
        epoch: Epoch,
        find: Find,
        serves: Serves,
    ) -> None:
        super().__init__(world, name, epoch)
        self.serves = serves
        self._config = config
        self._network = network
        self.engine = Engine(
            config,
            cast(Decoder, decoder),
            ReferenceKernel(),
            self._connect,
            world.clock,
            serves=serves,
            find=find,
            executors=lambda threads, _name: SimulatedExecutor(world, threads, self),
        )
        world.after(0.0, self._turn)
        world.every(0.1, self._tend, lambda: self.alive)

    def learn(self, members: Sequence[inference_pb2.Member]) -> None:
        """The membership changed."""
        self.engine.pool.update(attention_members(members, WorkerId(self.name), self._config))

    def load(self) -> inference_pb2.Load:
        """What heartbeats report; times are made up, since real ones would differ from run to run."""
        return inference_pb2.Load(
            sequences_running=self.engine.sequences_running,
            sequences_waiting=self.engine.sequences_waiting,
            waiting_tokens=self.engine.waiting_tokens,
            step_times=inference_pb2.StepTimes(
                dense_base_s=0.01, dense_row_s=0.001, attention_base_s=0.001, attention_token_s=0.0001
            ),
        )

    def move(self, order: control_pb2.MoveOrder) -> None:
        """The controller planned a move."""
        source, target = WorkerId(order.source), WorkerId(order.target)
        self.engine.move(sequence_key(order.sequence), source, target, order.tokens)

    def leave(self) -> None:
        """Drain: what runs here goes back to its gateways."""
        self.engine.refuse_new()
        self.engine.leave()

    def _tend(self) -> None:
        if self.answers:
            self.engine.pool.tend()

    def _turn(self) -> None:
        if not self.alive:
            return
        pause_s = _IDLE_S
        if self.answers and self.engine.turn():
            pause_s = self._world.rng.uniform(0.5, 1.5) * _STEP_S
        self._world.after(pause_s, self._turn)

    def _connect(self, member: AttentionMember) -> AttentionPeer:
        target = self._network.reach(self.name, member.address)
        return cast(AttentionPeer, SimulatedPeer(self._network, self, target))
