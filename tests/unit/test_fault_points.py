"""Named fault points: nothing when off, and a hold that ends when armed."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.fault_points import POINTS, FaultPoints

WAIT_S = 5.0


class Listener:
    """The other side: accepts one process and speaks line by line."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self.path)
        self._server.listen()
        self._server.settimeout(WAIT_S)

    def accept(self) -> None:
        """Take the process that connects."""
        connected, _ = self._server.accept()
        connected.settimeout(WAIT_S)
        self._lines = connected.makefile("rw")
        connected.close()

    def hear(self) -> str:
        """Its next line."""
        return self._lines.readline().strip()

    def say(self, line: str) -> None:
        """Tell it something."""
        self._lines.write(f"{line}\n")
        self._lines.flush()

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._server.close()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    """Somebody to be told by."""
    found = Listener(tmp_path / "listener")
    yield found
    found.close()


@pytest.fixture
def armed(listener: Listener) -> Iterator[FaultPoints]:
    """A process that said who it is."""
    points = FaultPoints(listener.path, "dense-0")
    listener.accept()
    assert listener.hear() == f"dense-0 {os.getpid()}"
    yield points
    listener.close()
    points.closed.wait(WAIT_S)


class Walker:
    """A thread that reaches a point again and again, and counts how often it got past."""

    def __init__(self, points: FaultPoints, point: str) -> None:
        self.passes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._walk, args=(points, point))
        self._thread.start()

    def _walk(self, points: FaultPoints, point: str) -> None:
        while not self._ended.is_set():
            points.reach(point)
            self.passes += 1

    def end(self) -> None:
        """Until it has got past once more and stopped."""
        self._ended.set()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


def test_a_wanted_point_holds_one_thread_until_told_to_go_on(armed: FaultPoints, listener: Listener) -> None:
    """The first thread that gets there stops and says so; others pass; it goes on when told to."""
    walker = Walker(armed, "append-apply")
    listener.say("hold append-apply")
    assert listener.hear() == "reached append-apply"
    held_at = walker.passes
    armed.reach("append-apply")
    armed.reach("sent-recorded")
    assert walker.passes == held_at
    listener.say("go")
    walker.end()
    assert walker.passes > held_at


def test_a_listener_that_is_gone_holds_nobody(armed: FaultPoints, listener: Listener) -> None:
    """When whoever asked hangs up, the held thread goes on."""
    walker = Walker(armed, "append-apply")
    listener.say("hold append-apply")
    assert listener.hear() == "reached append-apply"
    listener.close()
    walker.end()


def test_a_listener_that_goes_before_it_hears_ends_nothing(
    armed: FaultPoints, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A point is reached just as its listener hangs up, so that nobody can be told: the thread goes on."""
    tried = threading.Event()

    def broken(_socket: socket.socket, _line: bytes) -> None:
        tried.set()
        raise BrokenPipeError

    monkeypatch.setattr(socket.socket, "sendall", broken)
    walker = Walker(armed, "append-apply")
    listener.say("hold append-apply")
    assert tried.wait(WAIT_S)
    walker.end()


def test_every_point_is_reached_in_its_role() -> None:
    """Each name of `POINTS` stands in the code of its role, and no other does."""
    root = Path(__file__).parents[2] / "workers"
    for role, points in POINTS.items():
        found = {
            line.partition('reach("')[2].partition('"')[0]
            for file in (root / role).rglob("*.py")
            for line in file.read_text().splitlines()
            if line.strip().startswith('reach("')
        }
        assert found == set(points)
