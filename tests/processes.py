"""A cluster of real role processes under a bare membership: no Ray, no supervision, faults at will."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anabranch import Client
from anabranch.v1 import inference_pb2, kv_pb2, kv_pb2_grpc
from anabranch.wire import geometry_message
from cluster import config as configuration
from cluster import rpc
from cluster.config import Config
from cluster.model_spec import ModelSpec
from cluster.types import draw_epoch
from controller.balancer import BalancerSettings
from controller.membership import MembershipTable, Terms
from controller.service import ControlServer, ControlService

_READY_S = 60.0
_STOP_S = 30.0

Spawn = Callable[[str, Sequence[str], Path], "subprocess.Popen[bytes]"]
"""Starts a role's command, its output going to a file: (worker id, command, log)."""


def spawn_here(_worker_id: str, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """An ordinary process on this machine."""
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output)


class ProcessCluster:
    """Gateways, dense and attention workers as processes; membership in this process.

    `processes` maps worker ids to what runs; a killed one leaves the membership when it has been silent.
    """

    def __init__(self, config: Config, folder: Path, spawn: Spawn = spawn_here) -> None:
        self.config = config
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._spawn = spawn
        self._changed = threading.Condition()
        self._table = MembershipTable(
            Terms(config.digest, config.controller.heartbeat_ms, config.controller.expiry_ms),
            on_change=self._on_change,
        )
        geometry = ModelSpec.from_folder(config.model.path).geometry(
            config.model.dtype, config.attention.block_tokens
        )
        service = ControlService(
            self._table,
            draw_epoch(),
            geometry_message(geometry),
            lambda: (),
            lambda _grace_ms: None,
            balancing=BalancerSettings.of(config),
        )
        self._service = service
        self._server = ControlServer(config, service)
        self._closing = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="sweeper", daemon=True)
        self._file = folder / "config.yaml"
        self._file.write_text(config.to_yaml())

    @property
    def controller(self) -> str:
        """host:port of the control service."""
        return f"{self.config.controller.host}:{self._server.port}"

    def start(self) -> None:
        """Start every process and wait until all serve and know each other; a process that ends instead fails
        the test.
        """
        self._sweeper.start()
        config = self.config
        replicas = {
            "attention": config.attention.replicas,
            "dense": config.dense.replicas,
            "gateway": config.gateway.replicas,
        }
        for role, count in replicas.items():
            for index in range(count):
                self.launch(role, index)
        arenas = config.attention.replicas * len(config.attention.tiers)  # beside the first of each worker
        self.wait(lambda members: len(members) == len(self.processes) + arenas and _all_ready(members))
        self.wait(lambda _members: self._are_linked())

    def launch(self, role: str, index: int) -> None:
        """Start one process, in place of an ended one of that name."""
        worker_id = f"{role}-{index}"
        command = [sys.executable, "-m", f"workers.{role}", "--config", str(self._file)]
        command += ["--worker-id", worker_id, "--index", str(index)]
        command += ["--controller", self.controller]
        self.processes[worker_id] = self._spawn(worker_id, command, self.folder / f"{worker_id}.log")

    def wait(self, holds: Callable[[Sequence[inference_pb2.Member]], bool]) -> None:
        """Wait until the membership is as asked for."""
        end_s = time.monotonic() + _READY_S
        with self._changed:
            while not holds(self.members()):
                for worker_id, process in self.processes.items():
                    assert process.poll() is None, f"{worker_id} ended:\n{self.log(worker_id)}"
                assert time.monotonic() < end_s, f"not ready: {self.members()}"
                self._changed.wait(0.5)

    def _are_linked(self) -> bool:
        """Whether gateways reach all dense workers, and those all attention workers they may use. Until then
        who serves what depends on who was first.
        """
        links = {"gateway": ("link_ready", self.config.dense.replicas)}
        if self.config.placement.instances != "separate":
            attention = self.config.attention
            links["dense"] = ("peer_ready", attention.replicas * len(attention.every_tier))
        return all(
            (self.folder / f"{worker_id}.log").read_text().count(event) >= count
            for worker_id in self.processes
            for role, (event, count) in links.items()
            if worker_id.startswith(role)
        )

    def members(self) -> Sequence[inference_pb2.Member]:
        """Who lives."""
        return self._table.membership().members

    def log(self, worker_id: str) -> str:
        """The end of what a process wrote."""
        return (self.folder / f"{worker_id}.log").read_text()[-3000:]

    def client(self) -> Client:
        """A client of all gateways."""
        return Client([m.address for m in self.members() if m.role == inference_pb2.ROLE_GATEWAY])

    def kill(self, worker_id: str) -> None:
        """SIGKILL one process."""
        process = self.processes.pop(worker_id)
        process.kill()
        process.wait(_STOP_S)

    def drain(self, worker_id: str) -> subprocess.Popen[bytes]:
        """SIGTERM one process, which leaves when its work is elsewhere; the caller sees to its end."""
        process = self.processes.pop(worker_id)
        process.send_signal(signal.SIGTERM)
        return process

    def audits(self) -> Mapping[str, kv_pb2.AuditResponse]:
        """The account of every arena of the attention workers that run, from the workers themselves."""
        accounts = {}
        running = {process.pid for process in self.processes.values()}
        for member in self.members():
            if member.role == inference_pb2.ROLE_ATTENTION and member.process_id in running:
                with rpc.channel(member.address, self.config.security.tls) as channel:
                    stub = kv_pb2_grpc.KvServiceStub(channel)
                    accounts[member.worker_id] = stub.Audit(kv_pb2.AuditRequest(), timeout=10)
        return accounts

    def assert_nothing_leaks(self, within_s: float = 5.0) -> None:
        """Every block of every arena becomes free again."""
        end_s = time.monotonic() + within_s
        while True:
            accounts = self.audits()
            if all(
                account.blocks.free + account.blocks.sealed_cached == account.blocks.capacity
                for account in accounts.values()
            ):
                return
            assert time.monotonic() < end_s, f"blocks are still held: {accounts}"
            with self._changed:
                self._changed.wait(0.1)

    def stop(self) -> None:
        """SIGTERM everything, gateways first; each must end by itself with status 0."""
        problems = []
        for worker_id in sorted(self.processes, reverse=True):
            process = self.processes[worker_id]
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait(_STOP_S)
            if status != 0:
                problems.append(f"{worker_id} ended with {status}:\n{self.log(worker_id)}")
        self._closing.set()
        self._server.stop()
        assert not problems, "\n".join(problems)

    def _on_change(self, _member: inference_pb2.Member) -> None:
        with self._changed:
            self._changed.notify_all()

    def _sweep(self) -> None:
        while not self._closing.wait(self.config.controller.heartbeat_ms / 1000):
            self._table.sweep()
            self._service.sweep()


def _all_ready(members: Sequence[inference_pb2.Member]) -> bool:
    return all(member.state == inference_pb2.MEMBER_STATE_READY for member in members)


@contextmanager
def process_cluster(
    model: Path, folder: Path, overrides: Mapping[str, Any], spawn: Spawn = spawn_here
) -> Iterator[ProcessCluster]:
    """A started cluster on free ports, without HTTP unless asked for; stopped at the end."""
    defaults = {
        "model.path": str(model),
        "model.name": "tiny",
        "gateway.port": 0,
        "gateway.http_port": None,
        "controller.port": 0,
        "controller.heartbeat_ms": 100,
        "controller.expiry_ms": 5000,
        "attention.arena": "8MiB",
    }
    cluster = ProcessCluster(configuration.load(None, {**defaults, **overrides}), folder, spawn)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
