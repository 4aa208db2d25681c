"""Where lanes arrive: listening sockets, one thread per lane, and the count of all of them."""

from __future__ import annotations

import contextlib
import functools
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from cluster.clock import Clock, monotonic
from cluster.errors import AnabranchError, LaneBroken, ResourceExhausted, Unavailable
from cluster.telemetry import logger
from workers.lanes.frames import TICKET_BYTES
from workers.lanes.serve import LaneEnd, serve_link, serve_parts
from workers.lanes.sockets import SocketLink, abstract
from workers.lanes.tickets import TicketBook

_log = logger("lanes")

_ACCEPT_PAUSE_S = 0.5
_TICKET_TIMEOUT_S = 5.0
_JOIN_TIMEOUT_S = 10.0


@dataclass(slots=True, eq=False)
class _StreamBytes:
    """Bytes of a lane that is no socket."""

    bytes_sent: int = 0
    bytes_received: int = 0

    def count(self, arriving: Iterable[bytes]) -> Iterator[bytes]:
        """The same parts, counted."""
        for part in arriving:
            self.bytes_received += len(part)
            yield part


_Carrier = SocketLink | _StreamBytes


class LaneServer:
    """Accepts the connections of lanes and serves each on a thread of its own.

    A connection first sends its ticket, then `serve_link` runs until the lane ends. At most
    `lanes_most` at once. Owns the sockets and the threads; `close` ends all.
    """

    def __init__(
        self, lanes_most: int, stall_s: float, clock: Clock = monotonic, spin_s: float = 0.0
    ) -> None:
        """`spin_s`: how long a lane over a socket asks for a message before it sleeps."""
        self._spin_s = spin_s
        self._stall_s = stall_s
        self._tickets = TicketBook(lanes_most, clock)
        self._lanes_most = lanes_most
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._live: set[_Carrier] = set()
        self._threads: set[threading.Thread] = set()
        self._listeners: list[socket.socket] = []
        self._ended_sent = 0
        self._ended_received = 0

    def listen_unix(self) -> str:
        """Listen on an abstract socket, which a killed process leaves no file of; returns its name."""
        name = f"anabranch-lanes-{secrets.token_hex(8)}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(abstract(name))
        listener.listen()
        self._accept_on(listener)
        return name

    def listen_tcp(self, host: str, port: int = 0) -> int:
        """Listen on a TCP port; returns it. Raises Unavailable when it cannot be had."""
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            listener = socket.create_server((host, port), family=family)
        except OSError as error:
            raise Unavailable(f"lanes cannot listen on {host}:{port}: {error}") from error
        self._accept_on(listener)
        return int(listener.getsockname()[1])

    def expect(self, lane: LaneEnd) -> bytes:
        """The ticket with which the connection of `lane` must begin. Raises ResourceExhausted."""
        with self._lock:
            if len(self._live) >= self._lanes_most:
                raise ResourceExhausted(
                    f"{self._lanes_most} lanes are open; attention.max_lanes allows no more"
                )
        return self._tickets.issue(lane)

    def serve_stream(self, ticket: bytes, arriving: Iterable[bytes]) -> Iterator[bytes]:
        """Serve a lane over a stream of byte strings on the caller's thread (gRPC's)."""
        counted = _StreamBytes()
        with self._carrying(counted):
            for reply in serve_parts(self._tickets.redeem(ticket), counted.count(arriving)):
                counted.bytes_sent += len(reply)
                yield reply

    @property
    def lanes_open(self) -> int:
        """Connections being served."""
        return len(self._live)

    def bytes_carried(self) -> tuple[int, int]:
        """Bytes sent and received over all lanes, ended ones included."""
        with self._lock:
            return (
                self._ended_sent + sum(carrier.bytes_sent for carrier in self._live),
                self._ended_received + sum(carrier.bytes_received for carrier in self._live),
            )

    def close(self) -> None:
        """End every lane and listener. Idempotent."""
        self._stop.set()
        with self._lock:
            threads = list(self._threads)
            for listener in self._listeners:
                with contextlib.suppress(OSError):  # closed by its thread
                    _wake(listener)
            for carrier in self._live:
                if isinstance(carrier, SocketLink):
                    carrier.shut_down()
        for thread in threads:
            thread.join(_JOIN_TIMEOUT_S)

    def _start(self, name: str, work: Callable[[], None]) -> None:
        """Run `work` on a thread that `close` waits for."""

        def run() -> None:
            try:
                work()
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=name, daemon=True)
        with self._lock:
            self._threads.add(thread)
            thread.start()  # under the lock: `close` joins only threads that were started

    def _accept_on(self, listener: socket.socket) -> None:
        with self._lock:
            self._listeners.append(listener)
        self._start("lanes", functools.partial(self._accept, listener))

    def _accept(self, listener: socket.socket) -> None:
        listener.settimeout(_ACCEPT_PAUSE_S)
        with listener:
            while not self._stop.is_set():
                try:
                    connected, _ = listener.accept()
                except TimeoutError:
                    continue
                except OSError as error:
                    if self._stop.is_set():
                        return
                    # Out of descriptors, most likely: those who hold lanes go on.
                    _log.error("lane_not_accepted", error=error)
                    self._stop.wait(_ACCEPT_PAUSE_S)
                    continue
                if self._stop.is_set():
                    connected.close()
                    return
                self._start("lane", functools.partial(self._serve, SocketLink(connected, self._spin_s)))

    def _serve(self, link: SocketLink) -> None:
        try:
            with self._carrying(link):
                link.check_user()
                lane = self._tickets.redeem(_read_ticket(link))
                _log.info("lane_opened", incarnation=f"{lane.incarnation:016x}")
                serve_link(lane, link, self._stop, self._stall_s)
        except AnabranchError as error:
            _log.info("lane_ended", problem=error.message)
        finally:
            link.close()

    @contextlib.contextmanager
    def _carrying(self, carrier: _Carrier) -> Iterator[None]:
        """Count a lane as open. Raises ResourceExhausted beyond the limit."""
        with self._lock:
            if len(self._live) >= self._lanes_most:
                raise ResourceExhausted(f"{self._lanes_most} lanes are open")
            self._live.add(carrier)
        try:
            yield
        finally:
            with self._lock:
                self._live.discard(carrier)
                self._ended_sent += carrier.bytes_sent
                self._ended_received += carrier.bytes_received


def _wake(listener: socket.socket) -> None:
    """End a wait in `accept`. Raises OSError. That of a unix socket does not notice that it is shut down."""
    if listener.family != socket.AF_UNIX:
        listener.shutdown(socket.SHUT_RDWR)
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knocking:
        knocking.setblocking(False)
        knocking.connect(listener.getsockname())


def _read_ticket(link: SocketLink) -> bytes:
    """The first bytes of a connection. Raises LaneBroken when they do not come."""
    ticket = bytearray(TICKET_BYTES)
    filled = 0
    deadline_s = time.monotonic() + _TICKET_TIMEOUT_S
    while filled < TICKET_BYTES:
        count = link.read_into(memoryview(ticket)[filled:], deadline_s)
        if count == 0:
            raise LaneBroken("a connection brought no ticket")
        filled += count
    return bytes(ticket)
