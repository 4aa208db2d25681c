"""The controller: composes membership, supervision and the fleet, and runs them on one thread."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from anabranch.v1 import control_pb2, inference_pb2
from anabranch.wire import geometry_message
from cluster import rpc
from cluster.config import Config, is_loopback
from cluster.errors import AnabranchError, ConfigError, Unavailable
from cluster.model_spec import ModelSpec
from cluster.telemetry import logger
from cluster.types import KvGeometry, draw_epoch
from controller import ports, roles
from controller.balancer import BalancerSettings
from controller.events import ClusterReady, Observer, Opened, SlotChanged, Stopping
from controller.fleet import RayFleet
from controller.membership import MembershipTable, Terms
from controller.metrics import serve_metrics
from controller.placing import Demands, Placer
from controller.registry_writer import RegistryWriter, registry_writer
from controller.service import ControlServer, ControlService
from controller.slots import Limits, Order, Phase, Slot
from controller.state import ClusterRecord, StateFolder, process_start
from controller.supervisor import Supervisor

_log = logger("controller")

_TICK_S = 0.1
_ANSWER_S = 4.0


class Controller:
    """One cluster, from start to stop.

        opening --> starting --all ready--> serving --stop--> draining --> done
                        |                                        ^
                        +--a slot cannot be filled---------------+--> raises

    Everything that happens elsewhere (Ray's threads, the server's) is posted to the thread in `run`.
    """

    def __init__(self, config: Config, command: roles.Command = roles.module_command) -> None:
        """`config.model.path` is a folder; `command` says what a slot's process runs."""
        self._config = config
        self._command = command
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._state = StateFolder.of(config)
        self._slots = roles.slots(config)
        controller = config.controller
        self._table = MembershipTable(
            Terms(config.digest, controller.heartbeat_ms, controller.expiry_ms), on_change=self._on_member
        )
        self._supervisor: Supervisor | None = None
        self._failure: AnabranchError | None = None
        self._complete = False
        self._draining = False
        self._observe: Observer = lambda _event: None
        self.address = ""
        """host:port of the control server as roles reach it; empty until it listens."""

    def run(self, stop: threading.Event, observe: Observer = lambda _event: None) -> int:
        """Serve until `stop` or a Shutdown call; returns 0, or 1 if a process had to be killed.

        Raises, after everything has been stopped: ModelError, ConfigError, AlreadyExists (a cluster
        runs with this state folder), Unavailable (a port is taken, Ray is not there, a process kept
        failing), Unplaceable naming the missing resource.
        """
        self._observe = observe
        spec = ModelSpec.from_folder(Path(self._config.model.path))
        demands = Demands(self._config, spec)
        self._require_safe_hosts()
        geometry = spec.geometry(self._config.model.dtype, self._config.attention.block_tokens)
        self._require_arenas(geometry)
        service = ControlService(
            self._table,
            draw_epoch(),
            geometry_message(geometry),
            self._slot_messages,
            self._on_shutdown,
            self._on_drain,
            BalancerSettings.of(self._config),
        )
        with (
            self._state.claim(),
            self._fleet(demands) as fleet,
            self._registry(service) as writer,
            self._serving(service, fleet, writer),
        ):
            place = Placer(self._config, demands, fleet.nodes)
            if self._config.ray.address is None:
                place.require_room(self._slots)  # no node will join: waiting for one would not help
            slots = fleet.adopt(self._slots)
            hands = _TellingHands(fleet, self._table)
            self._supervisor = Supervisor(slots, self._limits(), place, hands, self._on_slot)
            fleet.listener = self._supervisor
            self._supervise(self._supervisor, stop, service, writer)
            if self._failure is not None:
                raise self._failure
            return 1 if self._supervisor.killed else 0

    def fleet(self) -> control_pb2.GetFleetResponse:
        """The fleet at this moment; from any thread."""
        return control_pb2.GetFleetResponse(
            membership=self._table.membership(), slots=self._slot_messages(), stopping=self._draining
        )

    def hurry(self) -> None:
        """Kill what still runs instead of waiting for it; from any thread or signal handler."""
        self._calls.put(lambda: self._drain(0.0))

    @contextmanager
    def _fleet(self, demands: Demands) -> Iterator[RayFleet]:
        if self._config.ray.address is None:
            ports.require_free(self._config)
        cpus = self._config.ray.local_cpus or demands.cpus(self._slots)
        fleet = RayFleet(self._config, cpus, partial(self._order, demands), self._calls.put)
        try:
            yield fleet
        finally:
            fleet.close()

    @contextmanager
    def _serving(self, service: ControlService, fleet: RayFleet, writer: RegistryWriter) -> Iterator[None]:
        # After Ray: starting Ray forks, and a fork among busy gRPC threads can hang its child.
        nodes = fleet.nodes()
        host = self._config.controller.host
        self._require_reachable(host, {node.address for node in nodes})
        server = ControlServer(self._config, service)
        try:
            self.address = f"{fleet.address if roles.is_wildcard(host) else host}:{server.port}"
            serve_metrics(self._config, writer.metrics, self.address)
            writer.claim(service.welcome(), self.address, self._config.digest)
            writer.start()
            self._observe(Opened(self.address, len(nodes)))
            yield
        finally:
            server.stop()

    def _registry(self, service: ControlService) -> AbstractContextManager[RegistryWriter]:
        # The processes of a private Ray cluster ended with the controller that started it.
        inherits = self._config.ray.address is not None
        return registry_writer(
            self._config, self._table, service.directory, inherits=inherits, on_taken=service.step_down
        )

    def _require_safe_hosts(self) -> None:
        """What each role would refuse to bind is refused before anything starts."""
        config = self._config
        for host in (config.controller.host, config.gateway.host, config.dense.host, config.attention.host):
            rpc.require_safe_bind(host, config.security)

    def _require_arenas(self, geometry: KvGeometry) -> None:
        attention, dense = self._config.attention, self._config.dense
        arenas = {"dense.local_arena": dense.local_arena} if dense.local_arena else {}
        if attention.replicas:
            arenas["attention.arena"] = attention.arena
            arenas |= {f"attention.tiers.{i}.arena": tier.arena for i, tier in enumerate(attention.tiers)}
        for key, arena_bytes in arenas.items():
            if arena_bytes < geometry.block_bytes:
                raise ConfigError(
                    f"{key}: {arena_bytes} bytes do not hold one block, which takes {geometry.block_bytes} "
                    f"bytes ({attention.block_tokens} tokens of this model): raise it, for example to 1GiB"
                )

    def _require_reachable(self, host: str, machines: set[str]) -> None:
        if len(machines) > 1 and is_loopback(host):
            raise ConfigError(
                f"the Ray cluster has {len(machines)} machines, but controller.host is {host}, which only "
                "this one can reach: set the hosts of controller, gateway, dense and attention (`anabranch "
                "up --host 0.0.0.0`), with security.tls or, in a private network, --insecure"
            )

    def _supervise(
        self,
        supervisor: Supervisor,
        stop: threading.Event,
        service: ControlService,
        writer: RegistryWriter,
    ) -> None:
        """The loop: what was posted, who fell silent, what is due."""
        sweep_next_s = 0.0
        if stop.is_set():  # told while Ray started
            self._drain(0.0)
        while not supervisor.is_stopped:
            self._run_calls()
            if time.monotonic() >= sweep_next_s:
                sweep_next_s = time.monotonic() + self._table.terms.heartbeat_ms / 1000
                for member in self._table.sweep(frozen=writer.is_away):
                    supervisor.silent(member.slot)
                service.sweep()
            supervisor.tick()
            if self._draining:
                service.announce_stop()
            elif stop.is_set():
                self._drain(self._config.controller.drain_grace_s)
            elif (failure := supervisor.failure(self._complete)) is not None:
                self._failure = failure
                # What never served as a whole has no streams to finish.
                self._drain(self._config.controller.drain_grace_s if self._complete else 0.0)
            elif not self._complete and supervisor.is_ready:
                self._publish()
                self._complete = True

    def _run_calls(self) -> None:
        """Run what was posted; wait up to a tick for the first."""
        try:
            self._calls.get(timeout=_TICK_S)()
            while True:
                self._calls.get_nowait()()
        except queue.Empty:
            return

    def _drain(self, grace_s: float) -> None:
        if not self._draining:
            self._draining = True
            self._observe(Stopping(grace_s))
        if self._supervisor is not None:
            self._supervisor.drain(grace_s)

    def _publish(self) -> None:
        """Let clients know the gateways there are, and the observer when nothing is missing. Raises
        ConfigError where the first record cannot be written; a later one is not worth the cluster.
        """
        record = self._record()
        try:
            self._state.write(record)
        except ConfigError as error:
            if not self._complete:
                raise
            _log.warning("record_not_written", problem=error.message)
        if self._supervisor is not None and self._supervisor.is_ready:
            self._observe(ClusterReady(record))

    def _on_member(self, member: inference_pb2.Member) -> None:
        if member.state == inference_pb2.MEMBER_STATE_READY:
            self._calls.put(lambda: self._on_ready(member))

    def _on_ready(self, member: inference_pb2.Member) -> None:
        # It may have ended since, and another process may be starting in its slot.
        if self._supervisor is not None and self._table.holds(member.worker_id, member.epoch):
            self._supervisor.ready(member.worker_id)
            if self._complete:
                self._publish()  # a gateway may have come back at another address

    def _on_slot(self, slot: Slot) -> None:
        if not slot.has_process:
            self._table.remove(slot.worker_id)
        self._observe(SlotChanged(slot))

    def _on_drain(self, worker_id: str, grace_s: float) -> None:
        """Let one worker leave; on the server's threads. Raises what `Supervisor.retire` raises, Unavailable
        while the controller is busy or the cluster still starts.
        """
        answer: Future[None] = Future()

        def drain() -> None:
            if self._supervisor is None:
                answer.set_exception(Unavailable("the cluster is still starting: try again"))
                return
            try:
                self._supervisor.retire(worker_id, grace_s)
            except AnabranchError as error:
                answer.set_exception(error)
            else:
                answer.set_result(None)

        self._calls.put(drain)
        try:
            answer.result(_ANSWER_S)
        except TimeoutError:
            raise Unavailable(f"the controller did not answer in {_ANSWER_S:g} s: try again") from None

    def _on_shutdown(self, grace_ms: int) -> None:
        self._calls.put(lambda: self._drain(grace_ms / 1000))

    def _slot_messages(self) -> list[control_pb2.Slot]:
        slots = self._supervisor.slots if self._supervisor is not None else ()
        return [_slot_message(slot) for slot in slots]

    def _order(self, demands: Demands, slot: Slot) -> Order:
        command = self._command(slot, self.address)
        return roles.order(self._config, slot, demands.of(slot), command, str(self._state.logs))

    def _limits(self) -> Limits:
        controller = self._config.controller
        return Limits(
            placement_timeout_s=self._config.placement.timeout_s,
            start_timeout_s=controller.start_timeout_s,
            restart_backoff_s=controller.restart_backoff_s,
            restarts_most=controller.max_restarts,
            elastic=self._config.placement.elastic,
        )

    def _record(self) -> ClusterRecord:
        gateways = [
            member for member in self._table.membership().members if member.role == inference_pb2.ROLE_GATEWAY
        ]
        return ClusterRecord(
            process_id=os.getpid(),
            process_started=process_start(os.getpid()),
            controller=self.address,
            model=self._config.model.served_name,
            gateways=tuple(member.address for member in gateways),
            http=tuple(url for member in gateways if (url := self._url(member)) is not None),
        )

    def _url(self, member: inference_pb2.Member) -> str | None:
        """Where a gateway answers HTTP, if its port is known beforehand."""
        port = self._config.gateway.http_port
        if not port:
            return None
        index = next(slot.index for slot in self._slots if slot.worker_id == member.worker_id)
        scheme = "https" if self._config.security.tls.enabled else "http"
        return f"{scheme}://{member.address.rpartition(':')[0]}:{self._config.port(port, index)}"


class _TellingHands:
    """The fleet's hands; a process that they end hears from the table how long it has, which SIGTERM does not
    say. See `Hands`.
    """

    def __init__(self, fleet: RayFleet, table: MembershipTable) -> None:
        self._table = table
        self._fleet = fleet
        self.launch = fleet.launch
        self.abandon = fleet.abandon

    def terminate(self, slot: Slot, grace_s: float) -> None:
        """Told first: a process that hears SIGTERM asks."""
        if grace_s > 0:
            self._table.dismiss(slot.worker_id, grace_s)
        self._fleet.terminate(slot, grace_s)


def _slot_message(slot: Slot) -> control_pb2.Slot:
    problem = f"{slot.phase.value}: {slot.problem}" if slot.problem else slot.phase.value
    return control_pb2.Slot(
        worker_id=slot.worker_id,
        role=roles.ROLES[slot.role],
        node=slot.node,
        problem="" if slot.phase is Phase.READY else problem,
        starts=slot.attempt,
        retired=slot.retires and slot.phase is Phase.STOPPED,
    )
