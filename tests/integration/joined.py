"""A cluster on a Ray cluster that was there before, under a controller in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from anabranch import Client
from anabranch.v1 import control_pb2, control_pb2_grpc
from cluster import config as configuration
from cluster import rpc
from cluster.errors import NotFound
from controller.state import StateFolder
from tests.controlled import DEADLINE_S, await_
from tests.integration.ray_nodes import RayNodes
from tests.redis_server import free_port

JOINING = "tests.integration.controller_program"
"""Runs a controller of processes that only join."""


class JoinedCluster:
    """What a user has who runs `python -m controller` again and again with one configuration file."""

    def __init__(
        self, folder: Path, ray: RayNodes, model: Path, program: str = "controller", **settings: Any
    ) -> None:
        """`program` is the controller's module. Settings are dotted keys with two underscores. One gateway,
        one dense worker, one that attends.
        """
        folder.mkdir(exist_ok=True)
        self._program = program
        self._folder = folder
        self._port = free_port()
        self._environment = ray.environment
        base = {
            "model.path": str(model),
            "model.name": "tiny",
            "gateway.port": 0,
            "gateway.http_port": None,
            "controller.port": self._port,
            "controller.heartbeat_ms": 200,
            "controller.expiry_ms": 1500,
            "controller.restart_backoff_s": 0.1,
            "controller.drain_grace_s": 4.0,
            "attention.replicas": 1,
            "attention.arena": "8MiB",
            "attention.block_tokens": 8,
            "state_dir": str(folder / "state"),
            "ray.address": ray.address,
            "registry.cluster": folder.name,
        }
        overrides = base | {key.replace("__", "."): value for key, value in settings.items()}
        self._state = StateFolder(folder / "state")
        self._file = folder / "cluster.yaml"
        self._file.write_text(configuration.load(None, overrides).to_yaml())
        self.controller: subprocess.Popen[bytes] | None = None

    def start_controller(self) -> subprocess.Popen[bytes]:
        """Start one beside those that live, if any; it is the one meant from now on."""
        with (self._folder / "controller.log").open("ab") as log:
            command = [sys.executable, "-m", self._program, "--config", str(self._file)]
            self.controller = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)
        return self.controller

    def kill_controller(self) -> None:
        """SIGKILL."""
        assert self.controller is not None
        self.controller.kill()
        self.controller.wait(DEADLINE_S)

    def await_ready(self) -> None:
        """Wait until every slot serves under the controller that runs."""

        def is_ready() -> bool:
            assert self.controller is not None
            assert self.controller.poll() is None, self.log
            slots = self.slots()
            return bool(slots) and not any(slot.problem for slot in slots.values())

        await_(is_ready, lambda: self.log)
        await_(self._is_recorded, lambda: self.log)

    def slots(self) -> dict[str, control_pb2.Slot]:
        """As the controller has them; none while it does not answer."""
        return {slot.worker_id: slot for slot in self._fleet().slots}

    def processes(self) -> dict[str, tuple[int, int]]:
        """Number and epoch of each member's process."""
        return {each.worker_id: (each.process_id, each.epoch) for each in self._fleet().membership.members}

    def client(self) -> Client:
        """A client of its gateways; it needs no controller any more."""
        return Client(self._state.read().gateways)

    def stop(self) -> int:
        """SIGTERM for the controller; its exit status."""
        assert self.controller is not None
        self.controller.terminate()
        return self.controller.wait(DEADLINE_S)

    def close(self) -> None:
        """Stop what runs, if anything does."""
        if self.controller is not None and self.controller.poll() is None:
            self.stop()

    @property
    def log(self) -> str:
        """What the controllers wrote."""
        return (self._folder / "controller.log").read_text()

    def _is_recorded(self) -> bool:
        try:
            record = self._state.read()
        except NotFound:  # that of the controller before
            return False
        return self.controller is not None and record.process_id == self.controller.pid

    def _fleet(self) -> control_pb2.GetFleetResponse:
        with rpc.channel(f"127.0.0.1:{self._port}", configuration.TlsConfig()) as channel:
            try:
                return control_pb2_grpc.ControlServiceStub(channel).GetFleet(
                    control_pb2.GetFleetRequest(), timeout=5
                )
            except grpc.RpcError:
                return control_pb2.GetFleetResponse()


@contextmanager
def joined(cluster: JoinedCluster) -> Iterator[JoinedCluster]:
    """The cluster, which serves; its controller is gone at the end, and with it what runs under it."""
    try:
        cluster.start_controller()
        cluster.await_ready()
        yield cluster
    finally:
        cluster.close()
