"""The controller with its real tables, and how members speak to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from anabranch.v1 import control_pb2, inference_pb2, types_pb2
from cluster.blocks import BlockHash
from cluster.config import Config
from cluster.errors import NotFound
from cluster.policies.directory import Life, Run
from cluster.types import LAYOUT_VERSION, WIRE_VERSION, Epoch, WorkerId
from controller.balancer import Balancer, BalancerSettings
from controller.directory_service import DirectoryKeeper
from controller.membership import MembershipTable, Terms
from tests.sim.world import World
from workers.attention.journal import Journal
from workers.known_members import KnownMembers


class SimulatedController:
    """One life after the other of the process that knows who lives."""

    def __init__(self, world: World, config: Config) -> None:
        self._world = world
        self._config = config
        self.lives = 0
        self.alive = False
        self.begin()

    def begin(self) -> None:
        """A new life, which knows nobody."""
        controller = self._config.controller
        terms = Terms("digest", controller.heartbeat_ms, controller.expiry_ms)
        self.table = MembershipTable(terms, self._world.clock)
        self.directory = DirectoryKeeper(self.table)
        settings = BalancerSettings.of(self._config)
        self.balancer = Balancer(settings, self.table, self.directory, self._world.clock)
        self.lives += 1
        self.alive = True
        life = self.lives
        self._world.every(
            controller.heartbeat_ms / 1000, self._tick, lambda: self.alive and self.lives == life
        )

    def end(self) -> None:
        """It is killed."""
        self.alive = False

    def gone(self, name: str) -> None:
        """A process ended; whoever watches it may be quick to say so, or leaves it to the expiry."""
        if self.alive and self._world.chance(0.7):
            self.table.remove(name)

    def find(self, hashes: Sequence[BlockHash], blocks_before: int) -> tuple[Run, ...]:
        """See `Find`."""
        if not self.alive or not hashes or self._world.chance(0.05):
            return ()
        request = control_pb2.FindPrefixRequest(block_hashes=hashes, blocks_before=blocks_before)
        return tuple(
            Run(run.blocks, tuple(Life(WorkerId(each.worker_id), Epoch(each.epoch)) for each in run.holders))
            for run in self.directory.find(request)
        )

    def _tick(self) -> None:
        self.table.sweep()
        self.directory.sweep()
        self.balancer.tick()


class SimulatedMember:
    """A process's side of the membership, by the rules of `workers.membership`."""

    def __init__(
        self,
        controller: SimulatedController,
        member: inference_pb2.Member,
        load: Callable[[], inference_pb2.Load],
        on_change: Callable[[Sequence[inference_pb2.Member]], None],
        on_move: Callable[[control_pb2.MoveOrder], None] = lambda _order: None,
        journal: Journal | None = None,
    ) -> None:
        self.member = member
        self._controller = controller
        self._load = load
        self._on_change = on_change
        self._on_move = on_move
        self._journal = journal
        self._known = KnownMembers()
        self._heard_from = 0

    def speak(self, now_s: float, expiry_s: float) -> None:
        """One sign of life. Raises Fenced where somebody else has its name."""
        controller = self._controller
        if not controller.alive:
            return
        try:
            news = controller.table.heartbeat(self._heartbeat())
        except NotFound:
            self.member.load.CopyFrom(self._load())
            news = controller.table.register(
                control_pb2.RegisterRequest(
                    member=self.member,
                    wire_version=WIRE_VERSION,
                    layout_version=LAYOUT_VERSION,
                    config_digest="digest",
                )
            )
            self._heard_from = controller.lives
        if news is not None:
            self._known.learn(controller.lives, news, now_s + expiry_s)
        if self._known.let_go(now_s) or news is not None:
            self._on_change(self._known.membership.members)
        for order in controller.balancer.orders(self.member.worker_id):
            self._on_move(order)

    def _heartbeat(self) -> control_pb2.HeartbeatRequest:
        controller = self._controller
        report = self._journal.report() if self._journal is not None else None
        request = control_pb2.HeartbeatRequest(
            believed=types_pb2.Believed(epoch=1),
            worker_id=self.member.worker_id,
            epoch=self.member.epoch,
            state=self.member.state,
            load=self._load(),
            membership_version=self._known.membership.version if self._heard_from == controller.lives else 0,
            pool=report,
        )
        if self._journal is not None and controller.table.holds(self.member.worker_id, self.member.epoch):
            self._journal.acknowledge(wants_all=not controller.directory.take(request))
        return request


def member_of(
    worker: str, role: inference_pb2.Role.ValueType, epoch: Epoch, address: str
) -> inference_pb2.Member:
    """A process that serves."""
    return inference_pb2.Member(
        worker_id=worker,
        role=role,
        epoch=epoch,
        address=address,
        state=inference_pb2.MEMBER_STATE_READY,
    )
