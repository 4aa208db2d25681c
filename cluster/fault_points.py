"""Named points on a request's way at which a test holds a process, to kill, freeze or cut it off there.

Off, which is always but in processes that a test or `anabranch chaos` starts for the purpose, a point costs
one look at a name. Armed, which takes a start argument that no controller gives and nothing is inherited
from, a process tells whoever listens at a unix socket who it is, and then, one line at a time:

    hold POINT -->  (the next thread that gets there stops)  --> reached POINT
    go         -->  (it goes on; so it does by itself after HOLD_MOST_S, or when the listener is gone)
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Mapping
from typing import IO

from cluster.telemetry import logger

HOLD_MOST_S = 5.0

POINTS: Mapping[str, tuple[str, ...]] = {
    "gateway": ("record-send", "acknowledge-finish"),
    "dense": ("reserve-commit", "append-apply", "sent-recorded"),
    "attention": ("reserve-commit", "append-apply", "seal-publish"),
}
"""The points of each role, by what lies before and behind them."""

_log = logger("fault_points")


class FaultPoints:
    """One armed process's side of the conversation."""

    def __init__(self, path: str, worker: str) -> None:
        """Connect and say who this is. Raises OSError."""
        self._wanted = ""
        self._lock = threading.Lock()
        self._go = threading.Event()
        self.closed = threading.Event()
        """Set once the listener is gone."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._say(f"{worker} {os.getpid()}")
        threading.Thread(target=self._listen, name="fault-points", daemon=True).start()

    def reach(self, point: str) -> None:
        """Hold here if that was asked for."""
        if point != self._wanted:
            return
        with self._lock:
            if point != self._wanted:
                return
            self._wanted = ""
            self._go.clear()
        with contextlib.suppress(OSError):  # the listener just went
            self._say(f"reached {point}")
            self._go.wait(HOLD_MOST_S)

    def _say(self, line: str) -> None:
        self._socket.sendall(f"{line}\n".encode())

    def _listen(self) -> None:
        orders: IO[str]
        with self._socket, self._socket.makefile("r") as orders:
            for order in orders:
                word, _, point = order.strip().partition(" ")
                if word == "hold":
                    self._wanted = point
                elif word == "go":
                    self._wanted = ""
                    self._go.set()
        self._wanted = ""
        self._go.set()
        self.closed.set()


_armed: FaultPoints | None = None


def arm(path: str, worker: str) -> None:
    """Arm this process, which is logged loudly. `path`: the listener's socket. Raises OSError."""
    global _armed
    _log.warning("fault_points_armed", listener=path, remark="a test may hold or kill this process")
    _armed = FaultPoints(path, worker)


def reach(point: str) -> None:
    """A named point is reached."""
    if _armed is not None:
        _armed.reach(point)
