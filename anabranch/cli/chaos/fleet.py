"""The processes under chaos: started, watched, replaced when lost, and asked for their accounts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from anabranch.cli.chaos.network import Network
from anabranch.cli.chaos.schedule import Role
from anabranch.cli.chaos.seen_members import SeenMembers
from anabranch.v1 import inference_pb2, kv_pb2, kv_pb2_grpc
from anabranch.wire import geometry_message
from cluster import rpc
from cluster.config import Config
from cluster.errors import Unavailable
from cluster.model_spec import ModelSpec
from cluster.types import draw_epoch
from controller import launch
from controller.balancer import BalancerSettings
from controller.membership import Terms
from controller.service import ControlServer, ControlService

_WATCH_S = 0.05
_START_S = 120.0
_LEAVE_S = 20.0
"""A process that was replaced while it was frozen or cut off must end by itself within this time."""


@dataclass(slots=True)
class Life:
    """One process of a slot. `struck`: a fault hit it, so that its end is no problem."""

    slot: str
    role: Role
    index: int
    process: subprocess.Popen[bytes]
    log_file: Path
    struck: bool = False
    returned_s: float | None = None
    """When it was let go on though its slot has another process."""

    @property
    def process_id(self) -> int:
        """Of the process."""
        return self.process.pid

    @property
    def ended(self) -> bool:
        """Whether the process is over."""
        return self.process.poll() is not None


class Fleet:
    """One process in each slot, each a member; what falls silent or ends gets a successor at once.

    running --ended--> replaced
       |  --silent--> replaced, kept as a stray --let go on--> fenced: it must end by itself

    `problems` are things that must not happen whatever dies. Belongs to one event loop, on the main thread.
    """

    def __init__(self, config: Config, folder: Path, network: Network, fault_listener: Path) -> None:
        self.problems: list[str] = []
        self.starts = 0
        self.kept_empty: frozenset[str] = frozenset()
        """Slots in which nothing is started for now."""
        self._overloaded = ""
        self._config = config
        self._folder = folder
        self._network = network
        self._environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._fault_listener = fault_listener
        controller = config.controller
        self.table = SeenMembers(Terms(config.digest, controller.heartbeat_ms, controller.expiry_ms), network)
        geometry = ModelSpec.from_folder(Path(config.model.path)).geometry(
            config.model.dtype, config.attention.block_tokens
        )
        self._service = ControlService(
            self.table,
            draw_epoch(),
            geometry_message(geometry),
            lambda: (),
            lambda _grace_ms: None,
            balancing=BalancerSettings.of(config),
        )
        self._server = ControlServer(config, self._service)
        self._file = folder / "config.yaml"
        self._file.write_text(config.to_yaml())
        self._lives: dict[str, Life] = {}
        self._strays: list[Life] = []
        self._closing = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="sweeper", daemon=True)
        self.gateways = [
            f"127.0.0.1:{network.listen(0, self._gateway(f'gateway-{index}'))}"
            for index in range(config.gateway.replicas)
        ]
        """Where clients reach the gateways, whichever process is in their slots."""

    async def start(self) -> None:
        """Start every process and wait until all serve. Raises Unavailable."""
        self._sweeper.start()
        counts: Mapping[Role, int] = {
            "attention": self._config.attention.replicas,
            "dense": self._config.dense.replicas,
            "gateway": self._config.gateway.replicas,
        }
        for role, count in counts.items():
            for index in range(count):
                self._launch(role, index)
        await self.wait_whole()

    async def watch(self) -> None:
        """Replace what is lost, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(_WATCH_S)

    def look(self) -> None:
        """Replace what ended or fell silent; see to it that strays leave."""
        held = {member.worker_id: member for member in self.table.membership().members}
        silent = self.table.taken_silent()
        for slot, life in list(self._lives.items()):
            if life.ended:
                if not life.struck:
                    self.problems.append(f"{slot} ended by itself: {self._last_words(life)}")
                if slot in held and held[slot].process_id == life.process_id:
                    self.table.remove(slot)
                if slot not in self.kept_empty:
                    self._launch(life.role, life.index)
            elif life.process_id in silent:
                if not life.struck:  # to start processes where there is no time for those that run ends badly
                    self._overloaded = (
                        f"{slot} gave no sign of life though nothing had struck it: is the machine busy?"
                    )
                self._strays.append(life)
                self._launch(life.role, life.index)
        for stray in list(self._strays):
            self._look_at_stray(stray)

    def is_whole(self) -> bool:
        """Whether every slot's process serves and nothing else is about."""
        members = {member.process_id: member for member in self.table.membership().members}
        return not self._strays and all(
            life.process_id in members
            and members[life.process_id].state == inference_pb2.MEMBER_STATE_READY
            and not life.ended
            for life in self._lives.values()
        )

    async def wait_whole(self) -> None:
        """Until the fleet is whole. Raises Unavailable when that takes too long."""
        await self.wait(self.is_whole)

    async def wait(self, holds: Callable[[], bool]) -> None:
        """Until something holds of the fleet. Raises Unavailable when that takes too long."""
        end_s = monotonic() + _START_S
        while not holds():
            self.look()
            if self._overloaded:
                raise Unavailable(self._overloaded)
            if monotonic() > end_s:
                words = [f"{life.slot}: {self._last_words(life)}" for life in self._lives.values()]
                raise Unavailable("the fleet is not whole:\n" + "\n".join(words))
            await asyncio.sleep(_WATCH_S)

    def living(self, role: Role) -> Sequence[Life]:
        """The present processes of a role."""
        return [life for life in self._lives.values() if life.role == role]

    def member(self, life: Life) -> inference_pb2.Member | None:
        """What a process last said of itself."""
        members = self.table.membership().members
        return next((member for member in members if member.process_id == life.process_id), None)

    def serves(self, slot: str) -> bool:
        """Whether the slot has a process that serves."""
        members = self.table.membership().members
        ready = inference_pb2.MEMBER_STATE_READY
        return any(member.worker_id == slot and member.state == ready for member in members)

    def is_current(self, life: Life) -> bool:
        """Whether a process still has its slot."""
        return self._lives.get(life.slot) is life

    def logs(self) -> dict[str, list[dict[str, Any]]]:
        """Every event each slot's processes logged, in order."""
        return {
            file.stem: [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")]
            for file in sorted(self._folder.glob("*.log"))
        }

    def audits(self) -> dict[str, kv_pb2.AuditResponse]:
        """The account of every attention worker, after a look at every block. Raises grpc.RpcError."""
        accounts = {}
        for life in self.living("attention"):
            member = self.member(life)
            if member is not None:
                with rpc.channel(member.address, self._config.security.tls) as channel:
                    stub = kv_pb2_grpc.KvServiceStub(channel)
                    accounts[life.slot] = stub.Audit(kv_pb2.AuditRequest(), timeout=10)
        return accounts

    def close(self) -> None:
        """SIGTERM all, gateways first; each must end by itself with status 0."""
        for life in sorted(self._lives.values(), key=lambda life: life.slot, reverse=True):
            life.process.terminate()
            try:
                status = life.process.wait(_LEAVE_S)
            except subprocess.TimeoutExpired:
                status = None
            if status != 0:
                self.problems.append(
                    f"{life.slot} told to stop ended with {status}: {self._last_words(life)}"
                )
        self.kill_all()

    def kill_all(self) -> None:
        """End everything at once. Idempotent."""
        for life in (*self._lives.values(), *self._strays):
            life.process.kill()
            life.process.wait()
        self._closing.set()
        self._server.stop()

    def _launch(self, role: Role, index: int) -> None:
        slot = f"{role}-{index}"
        way: list[int] = []  # the process's id, once it has one
        port = self._network.listen_for(way, f"127.0.0.1:{self._server.port}")
        command = [sys.executable, "-m", f"workers.{role}", "--config", str(self._file)]
        command += ["--worker-id", slot, "--index", str(index), "--controller", f"127.0.0.1:{port}"]
        command += ["--fault-points", str(self._fault_listener)]
        guarded = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), *command]
        log_file = self._folder / f"{slot}.log"
        with log_file.open("ab") as log:
            process = subprocess.Popen(guarded, stdout=log, stderr=log, env=self._environment)
        way.append(process.pid)
        self._lives[slot] = Life(slot, role, index, process, log_file)
        self.starts += 1

    def _gateway(self, slot: str) -> Any:
        def target() -> tuple[int, str] | None:
            members = self.table.membership().members
            found = next((member for member in members if member.worker_id == slot), None)
            return None if found is None else (found.process_id, found.address)

        return target

    def _look_at_stray(self, stray: Life) -> None:
        if stray.ended:
            self._strays.remove(stray)
        elif stray.returned_s is not None and monotonic() > stray.returned_s + _LEAVE_S:
            self.problems.append(f"{stray.slot}, replaced while it was away, came back and did not leave")
            stray.process.kill()

    def _last_words(self, life: Life) -> str:
        lines = [line for line in life.log_file.read_text().splitlines() if line.strip()]
        return f"status {life.process.poll()}; {lines[-1][:500] if lines else 'no words'}"

    def _sweep(self) -> None:
        while not self._closing.wait(self._config.controller.heartbeat_ms / 1000):
            self.table.sweep()
            self._service.sweep()


def send(life: Life, number: signal.Signals) -> None:
    """Signal a process, unless it is gone."""
    if not life.ended:
        life.process.send_signal(number)
