"""A network that misbehaves: a TCP proxy that delays, drops, swallows, corrupts or scrambles what passes.

It listens on another loopback address under the target's own port, so that whoever is told that address
reaches every port of a process through a proxy of its own, without knowing it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Literal

Manner = Literal["delay", "drop", "blackhole", "corrupt", "reorder"]

PROXY_HOST = "127.0.0.2"
"""Where proxies listen; the targets are at 127.0.0.1."""

_PIECE_BYTES = 64 * 1024
_DELAY_S = 0.02
_CONNECT_S = 5.0


class MisbehavingProxy:
    """Passes everything on until told to `misbehave`: then so many pieces from the target suffer.

    delay      they come later
    drop       the connection they are on breaks
    blackhole  they, and all that would follow on their connection, never come
    corrupt    one bit in the middle of them is another
    reorder    their second half comes first
    """

    def __init__(self, port: int) -> None:
        """In front of 127.0.0.1:`port`, at the same port of `PROXY_HOST`."""
        self.harmed = 0
        """Pieces that suffered so far."""
        self._port = port
        self._lock = threading.Lock()
        self._manner: Manner = "delay"
        self._left = 0
        self._least_bytes = 0
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server((PROXY_HOST, port))
        threading.Thread(target=self._accept, name=f"proxy-{port}", daemon=True).start()

    def misbehave(self, manner: Manner, pieces: int, least_bytes: int = 1) -> None:
        """Let the next `pieces` of at least `least_bytes` that the target sends suffer."""
        with self._lock:
            self._manner, self._left, self._least_bytes = manner, pieces, least_bytes

    def close(self) -> None:
        """Break every connection and stop listening."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            ends, self._sockets = self._sockets, set()
        for end in ends:
            _end(end)

    def __enter__(self) -> MisbehavingProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                theirs, _ = self._listener.accept()
            except OSError:
                return
            try:
                ours = socket.create_connection(("127.0.0.1", self._port), _CONNECT_S)
            except OSError:
                theirs.close()
                continue
            ours.settimeout(None)
            with self._lock:
                self._sockets |= {theirs, ours}
            for source, sink, suffers in ((theirs, ours, False), (ours, theirs, True)):
                threading.Thread(target=self._pass, args=(source, sink, suffers), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, suffers: bool) -> None:
        is_swallowing = False
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE_BYTES):
                manner = self._due(piece) if suffers else None
                if manner == "drop":
                    break
                is_swallowing |= manner == "blackhole"
                if not is_swallowing:
                    sink.sendall(_harmed(piece, manner))
        for end in (source, sink):
            _end(end)
        with self._lock:
            self._sockets -= {source, sink}

    def _due(self, piece: bytes) -> Manner | None:
        with self._lock:
            if self._left == 0 or len(piece) < self._least_bytes:
                return None
            self._left -= 1
            self.harmed += 1
            return self._manner


def _harmed(piece: bytes, manner: Manner | None) -> bytes:
    middle = len(piece) // 2
    if manner == "delay":
        threading.Event().wait(_DELAY_S)  # the fault itself
    elif manner == "corrupt":
        return piece[:middle] + bytes([piece[middle] ^ 1]) + piece[middle + 1 :]
    elif manner == "reorder":
        return piece[middle:] + piece[:middle]
    return piece


def _end(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
