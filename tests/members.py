"""A controller and members in this process, over real gRPC. Knows nothing of pytest."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from anabranch.v1 import control_pb2, inference_pb2
from anabranch.wire import geometry_message
from cluster.config import Config, ControllerConfig, ModelConfig
from cluster.types import Epoch, KvGeometry, WorkerId, draw_epoch
from controller.membership import MembershipTable, Terms
from controller.service import ControlServer, ControlService
from workers.membership import MembershipClient
from workers.role import RoleContext

DEADLINE_S = 10.0
NAMES = ["dense-0", "dense-1", "dense-2"]
GEOMETRY = KvGeometry(2, 4, 2, 16, "float32", 32, "digest-of-the-model")


@dataclass
class Controller:
    """A control server on loopback, and what it was told."""

    config: Config
    epoch: Epoch = field(default_factory=draw_epoch)
    changes: queue.SimpleQueue[inference_pb2.Member] = field(default_factory=queue.SimpleQueue)
    shutdowns: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        controller = self.config.controller
        terms = Terms(self.config.digest, controller.heartbeat_ms, controller.expiry_ms)
        self.table = MembershipTable(terms, on_change=self.changes.put)
        slot = control_pb2.Slot(worker_id="dense-0", role=inference_pb2.ROLE_DENSE, starts=1)
        self.service = ControlService(
            self.table, self.epoch, geometry_message(GEOMETRY), lambda: [slot], self.shutdowns.append
        )
        self.server = ControlServer(self.config, self.service)
        self.address = f"127.0.0.1:{self.server.port}"

    def await_joined(self, worker_id: str) -> None:
        """Wait until a process registered, whatever its state."""
        self.await_state(worker_id, inference_pb2.MEMBER_STATE_STARTING)

    def await_state(self, worker_id: str, state: int) -> None:
        """Wait until a member reported a state."""
        while True:
            member = self.changes.get(timeout=DEADLINE_S)
            if (member.worker_id, member.state) == (worker_id, state):
                return


def configured(port: int = 0, heartbeat_ms: int = 50, **model: Any) -> Config:
    """A configuration with a quick heartbeat."""
    controller = ControllerConfig(port=port, heartbeat_ms=heartbeat_ms, expiry_ms=max(2500, 2 * heartbeat_ms))
    return Config(controller=controller, model=ModelConfig(**model))


@contextmanager
def controlling(config: Config) -> Iterator[Controller]:
    """A controller that stops at the end."""
    controller = Controller(config)
    try:
        yield controller
    finally:
        controller.server.stop()


class Role:
    """A member's side: its client, and what it was told."""

    def __init__(
        self, config: Config, address: str, worker_id: str = "dense-0", epoch: Epoch | None = None
    ) -> None:
        epoch = draw_epoch() if epoch is None else epoch
        self.context = RoleContext("dense", config, WorkerId(worker_id), 0, epoch, address)
        self.memberships: queue.SimpleQueue[control_pb2.Membership] = queue.SimpleQueue()
        self.fenced = threading.Event()
        self.client = MembershipClient(
            self.context,
            inference_pb2.ROLE_DENSE,
            "127.0.0.1:9",
            load=lambda: inference_pb2.Load(sequences_running=3),
            on_change=self.memberships.put,
            on_fenced=self.fenced.set,
        )

    def await_members(self, *names: str) -> control_pb2.Membership:
        """Wait until the membership consists of exactly these."""
        while True:
            membership = self.memberships.get(timeout=DEADLINE_S)
            if [member.worker_id for member in membership.members] == sorted(names):
                return membership


@contextmanager
def member(config: Config, address: str, worker_id: str = "dense-0") -> Iterator[Role]:
    """A role that joined, and leaves at the end."""
    role = Role(config, address, worker_id)
    role.client.start()
    try:
        yield role
    finally:
        role.client.close()


def starting(role: Role) -> futures.Future[control_pb2.RegisterResponse]:
    """`start()` on a thread of its own."""
    pool = futures.ThreadPoolExecutor(1)
    result = pool.submit(role.client.start)
    pool.shutdown(wait=False)
    return result
