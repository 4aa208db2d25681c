"""Lanes over sockets: one code for unix sockets on one host and TCP between hosts."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence

from cluster.errors import LaneBroken

CONNECT_TIMEOUT_S = 5.0
_KEEPALIVE_S = 10
_KEEPALIVE_PROBES = 3
_SILENCE_MS = 30_000
_READ_SLICE_S = 0.05
_WRITE_SLICE_S = 0.002

_CREDENTIALS = struct.Struct("iII")
"""The kernel's struct ucred: process, user, group."""


class SocketLink:
    """A `ByteLink` over a connected stream socket; several buffers leave with one system call.

    The socket blocks, but a read comes back after `_READ_SLICE_S` so that it can look at its deadline: where
    bytes are on their way, one system call waits for them and takes them. Writes likewise.
    """

    def __init__(self, connected: socket.socket, spin_s: float = 0.0) -> None:
        """`spin_s`: how long a read asks again and again before it sleeps. Of use where a core is free for
        it: to wake a sleeping thread takes longer than most replies.
        """
        connected.setblocking(True)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(_READ_SLICE_S))
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(_WRITE_SLICE_S))
        if connected.family != socket.AF_UNIX:
            _tune(connected)
        self._socket = connected
        self._readable = select.poll()
        self._readable.register(connected, select.POLLIN)
        self.spin_s = spin_s
        self.bytes_sent = 0
        self.bytes_received = 0

    def fileno(self) -> int:
        """The socket's descriptor, for what only the kernel counts (TCP_INFO)."""
        return self._socket.fileno()

    def write(
        self, buffers: Sequence[memoryview], deadline_s: float, on_readable: Callable[[], None] | None
    ) -> None:
        """See `ByteLink.write`. What the kernel does not take at once waits in it: a poll would tell of room
        only when most of the buffer is empty, and the other side would run dry meanwhile.
        """
        waiting, flags = buffers, int(socket.MSG_DONTWAIT)
        while True:
            try:
                sent = self._socket.sendmsg(waiting, (), flags)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                raise LaneBroken(f"the lane broke: {error}") from error
            self.bytes_sent += sent
            waiting = _after(waiting, sent)
            if not waiting:
                return
            if time.monotonic() >= deadline_s:
                raise LaneBroken("the other side of the lane takes no bytes")
            flags = 0
            if on_readable is not None and self._readable.poll(0):
                on_readable()
                flags = int(socket.MSG_DONTWAIT)

    def read_into(self, target: memoryview, deadline_s: float) -> int:
        """See `ByteLink.read_into`."""
        while True:
            if self.spin_s:
                self._spin()
            flags = 0
            if deadline_s - time.monotonic() < _READ_SLICE_S:
                if not self._wait(deadline_s):
                    return 0
                flags = socket.MSG_DONTWAIT
            try:
                count = self._socket.recv_into(target, 0, flags)
            except BlockingIOError:
                continue
            except OSError as error:
                raise LaneBroken(f"the lane broke: {error}") from error
            if count == 0:
                raise LaneBroken("the other side closed the lane")
            self.bytes_received += count
            return count

    def check_user(self) -> None:
        """Refuse another user of this machine: an abstract socket has no mode. Raises LaneBroken."""
        if self._socket.family != socket.AF_UNIX:
            return
        told = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, user, _ = _CREDENTIALS.unpack(told)
        if user != os.getuid():
            raise LaneBroken(f"user {user} connected to a lane of user {os.getuid()}")

    def shut_down(self) -> None:
        """See `ByteLink.shut_down`."""
        with contextlib.suppress(OSError):  # not connected any more
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See `ByteLink.close`."""
        self.shut_down()
        self._socket.close()

    def _wait(self, deadline_s: float) -> bool:
        """Until bytes are there, or the other side's end; False when the deadline passed without."""
        try:
            return bool(self._readable.poll(max(0.0, (deadline_s - time.monotonic()) * 1000)))
        except (OSError, ValueError) as error:  # closed by another thread
            raise LaneBroken(f"the lane broke: {error}") from error

    def _spin(self) -> None:
        """Until bytes are there, but not for long."""
        poll, end_s = self._readable.poll, time.monotonic() + self.spin_s
        while not poll(0) and time.monotonic() < end_s:
            continue


def abstract(name: str) -> str:
    """The address of a unix socket without a file: it is gone with the process that listens."""
    return f"\0{name}"


def connect_unix(name: str, spin_s: float = 0.0) -> SocketLink:
    """Connect to an abstract socket. Raises LaneBroken."""
    return _connect(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), name, spin_s)


def connect_tcp(host: str, port: int, spin_s: float = 0.0) -> SocketLink:
    """Connect over TCP. Raises LaneBroken."""
    try:
        return SocketLink(socket.create_connection((host, port), CONNECT_TIMEOUT_S), spin_s)
    except OSError as error:
        raise LaneBroken(f"{host}:{port} cannot be reached: {error}") from error


def _connect(unconnected: socket.socket, name: str, spin_s: float) -> SocketLink:
    unconnected.settimeout(CONNECT_TIMEOUT_S)
    try:
        unconnected.connect(abstract(name))
    except OSError as error:
        unconnected.close()
        raise LaneBroken(f"{name} cannot be reached: {error}") from error
    return SocketLink(unconnected, spin_s)


def _tune(connected: socket.socket) -> None:
    """Small frames leave at once; a host that vanished without a word is noticed while nothing is sent."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_MS)


def _timeval(seconds: float) -> bytes:
    """The kernel's struct timeval."""
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def _after(buffers: Sequence[memoryview], sent: int) -> Sequence[memoryview]:
    """What is left of the buffers once `sent` bytes of them are gone."""
    for index, buffer in enumerate(buffers):
        if sent < buffer.nbytes:
            return [buffer.cast("B")[sent:], *buffers[index + 1 :]]
        sent -= buffer.nbytes
    return ()
