"""Messages over a socket with nothing around them: what lanes are measured against, and `doctor` uses.

A connection begins with the size of its messages, u64 little-endian; each message then comes back as it is.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from cluster.errors import Unavailable

_SIZE_BYTES = 8
_MESSAGE_BYTES_MOST = 2**24
_CONNECT_TIMEOUT_S = 5.0


def listen(host: str, port: int) -> socket.socket:
    """A TCP listener. Raises Unavailable."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise Unavailable(f"{host}:{port} cannot be listened on: {error}") from error


def bounce_all(listener: socket.socket) -> None:
    """Send every message back, on a thread a connection, until the listener is closed."""
    with contextlib.suppress(OSError):  # closed: that is how it ends
        while True:
            connected, _ = listener.accept()
            threading.Thread(target=_bounce, args=(connected,), daemon=True).start()


def connect(address: str | tuple[str, int], message_bytes: int) -> socket.socket:
    """A connection for messages of one size, to a socket file or (host, port). Raises Unavailable."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    connected = socket.socket(family, socket.SOCK_STREAM)
    try:
        connected.settimeout(_CONNECT_TIMEOUT_S)
        connected.connect(address)
        _tune(connected)
        connected.sendall(message_bytes.to_bytes(_SIZE_BYTES, "little"))
        connected.settimeout(None)
    except OSError as error:
        connected.close()
        raise Unavailable(f"{address} cannot be reached: {error}") from error
    return connected


def trip(connected: socket.socket, message_bytes: int) -> Callable[[], None]:
    """One message there and back. Raises Unavailable when the other side ends."""
    message = memoryview(bytearray(message_bytes))

    def send_and_take() -> None:
        connected.sendall(message)
        if not _receive(connected, message):
            raise Unavailable("the other side ended")

    return send_and_take


def _bounce(connected: socket.socket) -> None:
    size = bytearray(_SIZE_BYTES)
    with connected, contextlib.suppress(ConnectionError, TimeoutError):
        _tune(connected)
        if not _receive(connected, memoryview(size)):
            return
        message_bytes = int.from_bytes(size, "little")
        if not 0 < message_bytes <= _MESSAGE_BYTES_MOST:
            return
        message = memoryview(bytearray(message_bytes))
        while _receive(connected, message):
            connected.sendall(message)


def _receive(connected: socket.socket, target: memoryview) -> bool:
    """Fill the target; False at the other side's end."""
    filled = 0
    while filled < len(target):
        count = connected.recv_into(target[filled:])
        if count == 0:
            return False
        filled += count
    return True


def _tune(connected: socket.socket) -> None:
    if connected.family != socket.AF_UNIX:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
