"""Lanes over sockets: one code for unix sockets on one host and TCP between hosts."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Sequence

from cluster.errors import LaneBroken
from workers.lanes.frames import Bytes

CONNECT_TIMEOUT_S = 5.0
_KEEPALIVE_S = 10
_KEEPALIVE_PROBES = 3
_SILENCE_MS = 30_000


class SocketLink:
    """A `ByteLink` over a connected stream socket; several buffers leave with one system call."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        if connected.family != socket.AF_UNIX:
            _tune(connected)
        self._socket = connected
        self._poll = select.poll()
        self._poll.register(connected, 0)
        self.bytes_sent = 0
        self.bytes_received = 0

    def fileno(self) -> int:
        """The socket's descriptor, for what only the kernel counts (TCP_INFO)."""
        return self._socket.fileno()

    def write(self, buffers: Sequence[Bytes], deadline_s: float, on_readable: Callable[[], None]) -> None:
        """See `ByteLink.write`."""
        waiting = [buffer.data for buffer in buffers]
        while waiting:
            try:
                sent = self._socket.sendmsg(waiting)
            except BlockingIOError:
                events = self._wait(select.POLLIN | select.POLLOUT, deadline_s)
                if not events:
                    raise LaneBroken("the other side of the lane takes no bytes") from None
                if events & select.POLLIN:
                    on_readable()
                continue
            except OSError as error:
                raise LaneBroken(f"the lane broke: {error}") from error
            self.bytes_sent += sent
            waiting = _after(waiting, sent)

    def read_into(self, target: memoryview, deadline_s: float) -> int:
        """See `ByteLink.read_into`."""
        while True:
            try:
                count = self._socket.recv_into(target)
            except BlockingIOError:
                if not self._wait(select.POLLIN, deadline_s):
                    return 0
                continue
            except OSError as error:
                raise LaneBroken(f"the lane broke: {error}") from error
            if count == 0:
                raise LaneBroken("the other side closed the lane")
            self.bytes_received += count
            return count

    def shut_down(self) -> None:
        """Wake whoever waits in this link; its thread then closes it."""
        with contextlib.suppress(OSError):  # not connected any more
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See `ByteLink.close`."""
        self.shut_down()
        self._socket.close()

    def _wait(self, events: int, deadline_s: float) -> int:
        """The events that came, errors and hang-ups included; 0 when the deadline passed."""
        remaining_ms = (deadline_s - time.monotonic()) * 1000
        if remaining_ms < 0:
            return 0
        try:
            self._poll.modify(self._socket, events)
            ready = self._poll.poll(remaining_ms)
        except (OSError, ValueError) as error:  # closed by another thread
            raise LaneBroken(f"the lane broke: {error}") from error
        return ready[0][1] if ready else 0


def connect_unix(path: str) -> SocketLink:
    """Connect to a socket file. Raises LaneBroken."""
    return _connect(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), path)


def connect_tcp(host: str, port: int) -> SocketLink:
    """Connect over TCP. Raises LaneBroken."""
    try:
        return SocketLink(socket.create_connection((host, port), CONNECT_TIMEOUT_S))
    except OSError as error:
        raise LaneBroken(f"{host}:{port} cannot be reached: {error}") from error


def _connect(unconnected: socket.socket, address: str) -> SocketLink:
    unconnected.settimeout(CONNECT_TIMEOUT_S)
    try:
        unconnected.connect(address)
    except OSError as error:
        unconnected.close()
        raise LaneBroken(f"{address} cannot be reached: {error}") from error
    return SocketLink(unconnected)


def _tune(connected: socket.socket) -> None:
    """Small frames leave at once; a host that vanished without a word is noticed while nothing is sent."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_MS)


def _after(buffers: list[memoryview], sent: int) -> list[memoryview]:
    """What is left of the buffers once `sent` bytes of them are gone."""
    for index, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [buffer[sent:], *buffers[index + 1 :]]
        sent -= len(buffer)
    return []
