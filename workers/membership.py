"""A role's side of the membership: joins, says "alive", and learns who else lives.

Synchronous gRPC on a thread of its own that computes nothing, so that a busy role stays a live one.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent import futures
from os import getpid
from typing import Protocol

import grpc

from anabranch.v1 import control_pb2, control_pb2_grpc, inference_pb2, types_pb2
from cluster import rpc
from cluster.errors import AnabranchError, Cancelled, Fenced, NotFound, VersionMismatch
from cluster.telemetry import logger
from cluster.types import LAYOUT_VERSION, WIRE_VERSION, member_name
from workers.known_members import KnownMembers
from workers.registry_reader import RegistryReader
from workers.role import RoleContext, read_memory

_log = logger("membership")

_RETRY_FIRST_S = 0.1
_RETRY_MOST_S = 1.0
_REGISTER_TIMEOUT_S = 5.0


class PoolReporter(Protocol):
    """What an attention worker has to tell of its memory. Called on the client's thread, must not block."""

    def report(self) -> control_pb2.PoolReport:
        """The next report, or the last one again while it is not acknowledged."""
        ...

    def acknowledge(self, *, wants_all: bool) -> None:
        """The last report was taken; or it was not, and the next one must start over."""
        ...


class MembershipClient:
    """Keeps one process, or an arena of one (`tier`), a member of the cluster.

        joining --registered--> member --FENCED--> fenced (on_fenced, once; the thread ends)
           ^                      |
           +------NOT_FOUND-------+      (a restarted controller knows nobody)

    While the controller is away the last known members stay valid: the data path does not need it. Where a
    registry is configured, it is asked meanwhile: for newer members, for where the controller is now, and by
    a process that starts for its welcome. Whom another life of the controller has not met yet is kept (see
    `KnownMembers`).
    `load`, `on_change` and `on_fenced` are called on the client's thread and must not block; from
    asyncio, hand over with `loop.call_soon_threadsafe`. `on_change` receives the whole membership,
    this process included, after each change. A usual `on_fenced` is `context.stop.set`.

    `load` leaves resident memory out: it is filled in here. `set_pool` lets heartbeats report on a pool
    too, `set_mover` hears of moves, `set_follower` of where the controller answers now. When the controller
    wants this process to leave, `context.stop` is set, and `grace_s` says how long that may take.
    """

    def __init__(
        self,
        context: RoleContext,
        role: inference_pb2.Role.ValueType,
        address: str,
        load: Callable[[], inference_pb2.Load],
        on_change: Callable[[control_pb2.Membership], None],
        on_fenced: Callable[[], None],
        metrics_address: str = "",
        serving: inference_pb2.Serving.ValueType = inference_pb2.SERVING_UNSPECIFIED,
        tier: int = 0,
    ) -> None:
        self._context = context
        self._role = role
        self._address = address
        self._metrics_address = metrics_address
        self._serving = serving
        self._tier = tier
        self._worker_id = member_name(context.worker_id, tier)
        self._load = load
        self._on_change = on_change
        self._on_fenced = on_fenced
        self._state = inference_pb2.MEMBER_STATE_STARTING
        self._welcome: control_pb2.RegisterResponse | None = None
        self._known = KnownMembers()
        self._first: futures.Future[control_pb2.RegisterResponse] = futures.Future()
        self._pool: PoolReporter | None = None
        self._move: Callable[[control_pb2.MoveOrder], None] = lambda _order: None
        self._follow: Callable[[str], None] = lambda _controller: None
        self._closing = False
        self._leaves_s: float | None = None
        self._has_asked = threading.Event()  # how long draining may take
        self._wake = threading.Event()
        self._reader = RegistryReader(context.config)
        self._controller = self._followed = context.controller
        self._channel = rpc.channel(self._controller, context.config.security.tls)
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)
        self._thread = threading.Thread(target=self._run, name="membership", daemon=True)

    def start(self) -> control_pb2.RegisterResponse:
        """Join; blocks, trying again while neither controller nor registry is there, until joined and
        `on_change` was called.

        Raises VersionMismatch or Fenced when refused, Cancelled when the role is told to stop first.
        """
        self._thread.start()
        return self._first.result()

    def set_state(self, state: inference_pb2.MemberState.ValueType) -> None:
        """Report a new condition, at once."""
        self._state = state
        self._wake.set()

    def grace_s(self) -> float:
        """How long draining may take from now on: as long as was asked for at the controller, otherwise
        `controller.drain_grace_s`. To be called once the state is DRAINING; waits for the answer to that.
        """
        began_s = time.monotonic()
        self._has_asked.wait(self._first.result().expiry_ms / 1000)
        leaves_s = self._leaves_s
        if leaves_s is None:
            leaves_s = began_s + self._context.config.controller.drain_grace_s
        return max(0.0, leaves_s - time.monotonic())

    def set_pool(self, pool: PoolReporter) -> None:
        """Report what changes there, from the next heartbeat on."""
        self._pool = pool

    def set_mover(self, move: Callable[[control_pb2.MoveOrder], None]) -> None:
        """Carry out what the controller plans; called on the client's thread, must not block."""
        self._move = move

    def set_follower(self, follow: Callable[[str], None]) -> None:
        """Hear at which host:port the controller answers, whenever that is another one; to be set before
        `start`. Called on the client's thread, must not block.
        """
        self._follow = follow

    def membership(self) -> control_pb2.Membership:
        """Everyone alive as last heard; never modified in place."""
        return self._known.membership

    def close(self) -> None:
        """Stop reporting; the controller notices by expiry or by the process's end. Idempotent."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        self._channel.close()
        self._reader.close()

    def _run(self) -> None:
        try:
            self._keep_alive()
        except BaseException as error:
            if not self._first.done():
                self._first.set_exception(error)  # start() must not wait for a dead thread
            raise
        finally:
            self._has_asked.set()

    def _keep_alive(self) -> None:
        retry_s = _RETRY_FIRST_S
        while not self._is_over():
            asks = self._state == inference_pb2.MEMBER_STATE_DRAINING
            try:
                pause_s, retry_s = self._round(retry_s)
            except Fenced as error:
                self._end(error)
                return
            except Exception as error:  # a bug in what is reported or read must not look like a death
                if not self._first.done():
                    raise
                _log.error("heartbeat_failed", error=error)
                pause_s = _RETRY_MOST_S
            if asks:
                self._has_asked.set()
            self._wake.wait(pause_s)
            self._wake.clear()
        self._settle(Cancelled("told to stop before the controller was reached"))

    def _round(self, retry_s: float) -> tuple[float, float]:
        """One attempt to be alive; the pause before the next, and the one after a next that fails. Raises
        Fenced.
        """
        try:
            return self._speak(), _RETRY_FIRST_S
        except NotFound:
            _log.warning("membership_forgotten")
            self._welcome = None
            return 0.0, retry_s
        except Fenced:
            raise
        except AnabranchError as error:
            _log.warning("controller_away", controller=self._controller, problem=error.message)
            self._ask_registry()
            return retry_s, min(2 * retry_s, _RETRY_MOST_S)

    def _is_over(self) -> bool:
        return self._closing or (self._welcome is None and self._context.stop.is_set())

    def _speak(self) -> float:
        """Register or send one heartbeat; returns the pause before the next, in seconds."""
        began_s = time.monotonic()
        is_behind = False
        try:
            if self._welcome is None:
                self._register()
            else:
                is_behind = self._heartbeat(self._welcome)
        except grpc.RpcError as error:
            raise rpc.from_rpc(error) from error
        assert self._welcome is not None
        self._note_controller()
        self._let_go()
        if is_behind:
            return 0.0
        return max(0.0, self._welcome.heartbeat_ms / 1000 - (time.monotonic() - began_s))

    def _ask_registry(self) -> None:
        """Learn what the controller wrote, and look for it where it was last."""
        news = self._reader.look(self._known.membership.version)
        if news is not None:
            _log.info("membership_from_registry", members=len(news.membership.members))
            self._learn(news, news.membership)
            if not self._first.done():
                self._first.set_result(news)
        places = {self._context.controller, self._reader.controller or self._context.controller}
        for place in places - {self._controller}:
            self._controller = place
            self._channel.close()
            self._channel = rpc.channel(place, self._context.config.security.tls)
            self._stub = control_pb2_grpc.ControlServiceStub(self._channel)

    def _register(self) -> None:
        context = self._context
        member = inference_pb2.Member(
            worker_id=self._worker_id,
            role=self._role,
            epoch=context.epoch,
            address=self._address,
            state=self._state,
            host=socket.gethostname(),
            process_id=getpid(),
            load=self._loaded(),
            metrics_address=self._metrics_address,
            serving=self._serving,
            slot=context.worker_id,
            tier=self._tier,
        )
        request = control_pb2.RegisterRequest(
            member=member,
            wire_version=WIRE_VERSION,
            layout_version=LAYOUT_VERSION,
            config_digest=context.config.digest,
        )
        welcome = self._stub.Register(request, timeout=_REGISTER_TIMEOUT_S)
        _log.info("registered", controller=self._controller, members=len(welcome.membership.members))
        self._welcome = welcome
        if self._first.done() and self._first.result().geometry != welcome.geometry:
            raise VersionMismatch("this controller serves another model than the one that was joined; end")
        self._learn(welcome, welcome.membership)
        self._known.keep_until(_expiry_of(welcome))
        if not self._first.done():
            self._first.set_result(welcome)

    def _heartbeat(self, welcome: control_pb2.RegisterResponse) -> bool:
        """Returns whether there is more to report at once."""
        pool = self._pool
        report = pool.report() if pool is not None else None
        request = control_pb2.HeartbeatRequest(
            believed=types_pb2.Believed(epoch=welcome.responder.epoch),
            worker_id=self._worker_id,
            epoch=self._context.epoch,
            state=self._state,
            load=self._loaded(),
            membership_version=self._known.membership.version,
            pool=report,
        )
        # Half the expiry leaves time for a second attempt before silence is taken for death.
        response = self._stub.Heartbeat(request, timeout=welcome.expiry_ms / 2000)
        if pool is not None:
            pool.acknowledge(wants_all=response.wants_all)
        if response.HasField("membership"):
            self._learn(welcome, response.membership)
        for order in response.moves:
            self._move(order)
        if response.HasField("drain_ms"):
            self._leave(response.drain_ms / 1000)
        return response.wants_all or (report is not None and report.has_more)

    def _leave(self, grace_s: float) -> None:
        """Somebody wants this process to drain: at the first word of it, let it."""
        if self._leaves_s is None:
            _log.info("told_to_leave", grace_s=grace_s)
            self._leaves_s = time.monotonic() + grace_s
            self._context.stop.set()

    def _loaded(self) -> inference_pb2.Load:
        load = inference_pb2.Load()
        load.CopyFrom(self._load())
        memory = read_memory()
        load.resident_bytes = memory.resident_bytes
        load.resident_peak_bytes = memory.peak_bytes
        return load

    def _note_controller(self) -> None:
        """The controller answered where it is looked for now."""
        if self._followed != self._controller:
            self._followed = self._controller
            self._follow(self._controller)

    def _learn(self, welcome: control_pb2.RegisterResponse, said: control_pb2.Membership) -> None:
        """Take what the controller that gave this welcome says."""
        self._known.learn(welcome.responder.epoch, said, _expiry_of(welcome))
        self._publish()

    def _let_go(self) -> None:
        """Give up whom another life of the controller has not met in time."""
        gone = self._known.let_go(time.monotonic())
        if gone:
            _log.warning("members_not_found_again", members=gone)
            self._publish()

    def _publish(self) -> None:
        """Let everyone know who lives."""
        try:
            self._on_change(self._known.membership)
        except Exception as error:  # noqa: BLE001  a bug in a callback must not make a live process look dead
            _log.error("membership_callback_failed", error=error)

    def _end(self, error: Fenced) -> None:
        if self._settle(error):
            return  # start() raises it
        _log.error("fenced", problem=error.message)
        self._on_fenced()

    def _settle(self, error: AnabranchError) -> bool:
        """Let start() fail if it still waits; returns whether it did."""
        if self._first.done():
            return False
        self._first.set_exception(error)
        return True


def _expiry_of(welcome: control_pb2.RegisterResponse) -> float:
    """When a silence that begins now is taken for death, on the monotonic clock."""
    return time.monotonic() + welcome.expiry_ms / 1000
