"""Two dense workers over one pool whose attention workers report to a controller. Knows nothing of pytest.

Everything is real but the processes: a control server, members' clients with heartbeats, attention workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from anabranch.v1 import inference_pb2, types_pb2
from cluster.blocks import BlockHash
from cluster.config import Config, ControllerConfig, TlsConfig
from cluster.types import WorkerId, draw_epoch
from controller.balancer import NO_MOVES, BalancerSettings
from controller.membership import MembershipTable, Terms
from controller.service import ControlServer, ControlService
from tests.cluster_harness import WAIT_S, DenseCluster, Output, Shape, wait_until
from workers.dense.engine import Engine
from workers.dense.finder import PrefixFinder
from workers.dense.prefixes import BlockChain
from workers.dense.sequences import Submission
from workers.membership import MembershipClient
from workers.role import RoleContext

HEARTBEAT_MS = 50


class DirectoryController:
    """One life of a controller that members join. A busy machine must not make a member look dead."""

    def __init__(self, port: int = 0, balancing: BalancerSettings = NO_MOVES) -> None:
        settings = ControllerConfig(port=port, heartbeat_ms=HEARTBEAT_MS, expiry_ms=60_000)
        self.config = Config(controller=settings)
        terms = Terms(self.config.digest, settings.heartbeat_ms, settings.expiry_ms)
        self.table = MembershipTable(terms)
        self.service = ControlService(
            self.table,
            draw_epoch(),
            types_pb2.KvGeometry(),
            lambda: (),
            lambda _grace_ms: None,
            balancing=balancing,
        )
        self._server = ControlServer(self.config, self.service)
        self.port = self._server.port
        self.address = f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        """End it; what it knew is gone."""
        self._server.stop()


class TwoDenseWorkers:
    """A cluster of two engines, `first` and `second`, each with its own knowledge of prefixes. Use with
    `with`.
    """

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.controller = DirectoryController()
        # The tests' machine may be busy: what is claimed here is not how fast the controller answers.
        self.finder = PrefixFinder(self.controller.address, TlsConfig(), timeout_s=WAIT_S)
        self.cluster = DenseCluster(folder, shape, self.finder.find)
        self.first: Engine = self.cluster.engine
        self.second: Engine = self.cluster.new_engine()
        self._clients: list[MembershipClient] = []

    def __enter__(self) -> TwoDenseWorkers:
        self.cluster.__enter__()
        self.cluster.attach(self.second)
        for worker in self.cluster.workers:
            self._join(worker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for client in self._clients:
                client.close()
            self.second.stop()
            self.cluster.__exit__(kind, error, trace)
        finally:
            self.finder.close()
            self.controller.stop()

    def restart_controller(self) -> None:
        """Another life of the controller at the same address, which knows nothing."""
        port = self.controller.port
        self.controller.stop()
        self.controller = DirectoryController(port)

    def generate(self, submission: Submission, engine: Engine) -> Output:
        """Run one submission to its end."""
        return self.cluster.listener.wait(self.cluster.submit(submission, engine))

    def hashes(self, token_ids: Sequence[int], tenant: str = "tenant") -> list[BlockHash]:
        """The identities of a sequence's full blocks."""
        chain = BlockChain(self.cluster.geometry, tenant)
        chain.grow(token_ids)
        return chain.hashes

    def found(self, token_ids: Sequence[int], tenant: str = "tenant") -> int:
        """How many of these tokens the directory says lie somewhere."""
        runs = self.finder.find(self.hashes(token_ids, tenant), 0)
        return sum(run.blocks for run in runs) * self.cluster.geometry.block_tokens

    def wait_found(self, token_ids: Sequence[int], tokens: int) -> None:
        """Until the directory knows where so many of these tokens lie."""
        wait_until(lambda: self.found(token_ids) == tokens)

    def _join(self, worker: WorkerId) -> None:
        client = joined(self.controller, self.cluster, worker)
        client.set_state(inference_pb2.MEMBER_STATE_READY)
        self._clients.append(client)


def joined(controller: DirectoryController, cluster: DenseCluster, worker: WorkerId) -> MembershipClient:
    """A cluster's attention worker as a member that still starts and reports its pool; to be closed."""
    server = cluster.workers[worker]
    client = MembershipClient(
        RoleContext("attention", controller.config, worker, 0, cluster.epochs[worker], controller.address),
        inference_pb2.ROLE_ATTENTION,
        f"127.0.0.1:{server.port}",
        server.load,
        on_change=lambda _membership: None,
        on_fenced=lambda: None,
    )
    client.start()
    client.set_pool(server.core.journal)
    return client
