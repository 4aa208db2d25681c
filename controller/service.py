"""The control service: the membership table and the fleet over gRPC."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from anabranch.v1 import control_pb2, control_pb2_grpc, types_pb2
from cluster import rpc
from cluster.config import Config
from cluster.errors import InvalidRequest, NotFound, Unavailable
from cluster.types import Epoch
from controller.balancer import NO_MOVES, Balancer, BalancerSettings
from controller.directory_service import DirectoryKeeper
from controller.membership import MembershipTable

CONTROLLER_ID = "controller-0"
_THREADS = 16
"""Handlers only touch a table; this many calls wait for its lock at most."""

_SERVICE = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name


class ControlService(control_pb2_grpc.ControlServiceServicer):
    """Answers roles and the command line. Owns the directory of what they report, and the plans of moves;
    table, slots and shutdown are given.

    `slots` lists what should run; `shut_down` is told the grace in milliseconds, must not block, and may
    refuse with an error; `drain` is told a worker and its grace in seconds, and raises what
    `Supervisor.retire` raises. Where nobody supervises, the worker is told to leave, and does so by itself.
    """

    def __init__(
        self,
        table: MembershipTable,
        epoch: Epoch,
        geometry: types_pb2.KvGeometry,
        slots: Callable[[], Sequence[control_pb2.Slot]],
        shut_down: Callable[[int], None],
        drain: Callable[[str, float], None] | None = None,
        balancing: BalancerSettings = NO_MOVES,
    ) -> None:
        self._table = table
        self._responder = types_pb2.Responder(worker_id=CONTROLLER_ID, epoch=epoch)
        self._geometry = geometry
        self._slots = slots
        self._drain = drain or table.drain
        self._shut_down = shut_down
        self._stopping = False
        self._is_replaced = False
        self.directory = DirectoryKeeper(table)
        self._balancer = Balancer(balancing, table, self.directory)

    def sweep(self) -> None:
        """Forget what membership no longer names, and plan moves where they are due. To be called every
        heartbeat interval, after the table's own sweep.
        """
        self.directory.sweep()
        self._balancer.tick()

    @rpc.unary
    def Register(
        self, request: control_pb2.RegisterRequest, _context: grpc.ServicerContext
    ) -> control_pb2.RegisterResponse:
        """See control.proto."""
        self._require_office()
        membership = self._table.register(request)
        welcome = self.welcome()
        welcome.membership.CopyFrom(membership)
        return welcome

    @rpc.unary
    def Heartbeat(
        self, request: control_pb2.HeartbeatRequest, _context: grpc.ServicerContext
    ) -> control_pb2.HeartbeatResponse:
        """See control.proto. A member of another controller, or from before a restart, hears NOT_FOUND:
        registering again is what it must do.
        """
        self._require_office()
        news = self._table.heartbeat(request)
        if request.believed.epoch not in (0, self._responder.epoch):
            raise NotFound(
                f"this controller is {self._responder.epoch:016x}, not {request.believed.epoch:016x}: "
                "register again"
            )
        is_taken = self.directory.take(request)
        left_s = self._table.left_s(request.worker_id)
        return control_pb2.HeartbeatResponse(
            responder=self._responder,
            membership=news,
            wants_all=not is_taken,
            moves=self._balancer.orders(request.worker_id),
            drain_ms=None if left_s is None else int(left_s * 1000),
        )

    @rpc.unary
    def FindPrefix(
        self, request: control_pb2.FindPrefixRequest, _context: grpc.ServicerContext
    ) -> control_pb2.FindPrefixResponse:
        """See control.proto."""
        self._require_office()
        return control_pb2.FindPrefixResponse(responder=self._responder, runs=self.directory.find(request))

    @rpc.unary
    def GetFleet(
        self, _request: control_pb2.GetFleetRequest, _context: grpc.ServicerContext
    ) -> control_pb2.GetFleetResponse:
        """See control.proto."""
        return self.fleet()

    @rpc.unary
    def Drain(
        self, request: control_pb2.DrainRequest, _context: grpc.ServicerContext
    ) -> control_pb2.DrainResponse:
        """See control.proto."""
        name = request.worker_id
        for member in self._table.membership().members:
            if member.worker_id == name != member.slot:
                raise InvalidRequest(f"{name} is an arena of {member.slot}, which drains as a whole")
        self._drain(name, request.grace_ms / 1000)
        return control_pb2.DrainResponse(responder=self._responder)

    @rpc.unary
    def Shutdown(
        self, request: control_pb2.ShutdownRequest, _context: grpc.ServicerContext
    ) -> control_pb2.ShutdownResponse:
        """See control.proto."""
        self._shut_down(request.grace_ms)
        self.announce_stop()
        return control_pb2.ShutdownResponse(responder=self._responder)

    def welcome(self) -> control_pb2.RegisterResponse:
        """What a new member is told, but for the membership."""
        return control_pb2.RegisterResponse(
            responder=self._responder,
            heartbeat_ms=self._table.terms.heartbeat_ms,
            expiry_ms=self._table.terms.expiry_ms,
            geometry=self._geometry,
        )

    def fleet(self) -> control_pb2.GetFleetResponse:
        """The fleet at this moment."""
        return control_pb2.GetFleetResponse(
            responder=self._responder,
            membership=self._table.membership(),
            slots=self._slots(),
            stopping=self._stopping,
        )

    def announce_stop(self) -> None:
        """Let `GetFleet` say that the cluster stops."""
        self._stopping = True

    def step_down(self) -> None:
        """Another controller took over: send members away from here, so that they look for it. Idempotent."""
        self._is_replaced = True

    def _require_office(self) -> None:
        if self._is_replaced:
            raise Unavailable("another controller took over from this one: the registry says where it is")


class ControlServer:
    """A listening control service, with health and reflection."""

    def __init__(self, config: Config, service: ControlService) -> None:
        """Raises Unavailable when the port is taken, ConfigError when it must not be opened."""
        self._server = rpc.server(_THREADS)
        control_pb2_grpc.add_ControlServiceServicer_to_server(service, self._server)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.port = rpc.bind(self._server, config.controller.host, config.controller.port, config.security)
        self._server.start()
        for name in ("", _SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> None:
        """Refuse new calls, let open ones finish for a second. Idempotent."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace=1.0).wait(timeout=5.0)
