"""A cluster of which every part is a process, the controller too; each can be killed and started again."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anabranch import Client
from anabranch.v1 import control_pb2, control_pb2_grpc, inference_pb2
from cluster import config as configuration
from cluster import rpc
from cluster.registry.settings import RegistryConfig
from tests.listening import tcp_ports
from tests.redis_server import free_port

DEADLINE_S = 60.0
JOINING = "tests.integration.role_program"
"""Runs a process that only joins."""


def await_(holds: Callable[[], bool], problem: Callable[[], str] = lambda: "never") -> None:
    """Wait until something holds."""
    end_s = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < end_s, problem()
        threading.Event().wait(0.02)


class ControlledCluster:
    """Processes by worker id, "controller" among them; each writes NAME.log in the folder."""

    def __init__(self, folder: Path, model: Path, registry: RegistryConfig, **settings: Any) -> None:
        """Settings are dotted keys with two underscores."""
        self._folder = folder
        self.port = free_port()
        base = {
            "model.path": str(model),
            "model.name": "tiny",
            "gateway.port": 0,
            "gateway.http_port": None,
            "controller.heartbeat_ms": 100,
            "controller.expiry_ms": 1000,
            "attention.arena": "8MiB",
            "attention.block_tokens": 8,
            "registry": registry.model_dump() | {"deadline_ms": 440},
        }
        self._settings = base | {key.replace("__", "."): value for key, value in settings.items()}
        self._file = folder / "config.yaml"
        self._file.write_text(configuration.load(None, dict(self._settings)).to_yaml())
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start_controller(self, port: int | None = None) -> None:
        """Start the controller, at another port if one is given."""
        self.port = port or self.port
        file = self._folder / f"controller-{self.port}.yaml"
        settings = self._settings | {"controller.port": self.port}
        file.write_text(configuration.load(None, settings).to_yaml())
        words = ["controller", "--config", str(file), "--alone", f"127.0.0.1:{self.port}"]
        self._spawn("controller", words)
        await_(self.controller_answers, lambda: self.log("controller"))

    def launch(self, worker_id: str, module: str = "") -> None:
        """Start a role; by default the real one."""
        role, _, index = worker_id.partition("-")
        words = [module or f"workers.{role}", "--config", str(self._file), "--worker-id", worker_id]
        self._spawn(worker_id, [*words, "--index", index, "--controller", f"127.0.0.1:{self.port}"])

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal."""
        self.processes[name].send_signal(number)

    def kill(self, name: str) -> None:
        """SIGKILL."""
        process = self.processes.pop(name)
        process.kill()
        process.wait(DEADLINE_S)

    def members(self) -> dict[str, inference_pb2.Member]:
        """Who lives, by name, as the controller says."""
        with rpc.channel(f"127.0.0.1:{self.port}", configuration.TlsConfig()) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            fleet = stub.GetFleet(control_pb2.GetFleetRequest(), timeout=5, wait_for_ready=True)
        return {member.worker_id: member for member in fleet.membership.members}

    def epochs(self) -> dict[str, int]:
        """Each member's life."""
        return {name: member.epoch for name, member in self.members().items()}

    def await_ready(self, *names: str) -> None:
        """Wait until exactly these are members and serve."""
        ready = inference_pb2.MEMBER_STATE_READY

        def holds() -> bool:
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended:\n{self.log(name)}"
            found = self.members()
            return sorted(found) == sorted(names) and all(each.state == ready for each in found.values())

        await_(holds, lambda: f"members: {self.members()}")

    def await_logged(self, name: str, text: str, times: int = 1) -> None:
        """Wait until a process has logged something so often."""
        await_(lambda: self.log(name).count(text) >= times, lambda: self.log(name))

    def controller_answers(self) -> bool:
        """Whether the controller takes connections."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def client(self, *gateways: str) -> Client:
        """A client of these gateways, known by their sockets."""
        ports = [tcp_ports(self.processes[name].pid) for name in gateways]
        return Client([f"127.0.0.1:{port}" for found in ports for port in found])

    def log(self, name: str) -> str:
        """What a process wrote."""
        return (self._folder / f"{name}.log").read_text()

    def stop(self) -> None:
        """End everything, frozen processes too; the roles with the grace they need."""
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
        for name in sorted(self.processes, key=lambda name: (name == "controller", name)):
            process = self.processes[name]
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(DEADLINE_S)

    def _spawn(self, name: str, words: Sequence[str]) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen([sys.executable, "-m", *words], stdout=log, stderr=log)


@contextmanager
def controlled(
    folder: Path, model: Path, registry: RegistryConfig, **settings: Any
) -> Iterator[ControlledCluster]:
    """A cluster with a controller and nobody else yet; gone at the end."""
    cluster = ControlledCluster(folder, model, registry, **settings)
    try:
        cluster.start_controller()
        yield cluster
    finally:
        cluster.stop()
