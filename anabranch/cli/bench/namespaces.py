"""A network namespace for the other process of a bench, joined to ours by a veth pair: TCP between two hosts'
stacks on one machine. Needs root and `ip`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from cluster.errors import AnabranchError, Unavailable

_NAME = "anabranch-bench-"
_OUR_ADDRESS = "198.18.211.1"
_PEER_ADDRESS = "198.18.211.2"
"""Of the range kept for benchmarks (RFC 2544): nobody's network has it."""
_IP_TIMEOUT_S = 20


@dataclass(frozen=True, slots=True)
class Way:
    """How a peer is reached: the address it listens on, what stands before its command, and in words."""

    host: str
    prefix: tuple[str, ...]
    network: str


LOOPBACK = Way("127.0.0.1", (), "loopback")


@contextlib.contextmanager
def way_to_peer() -> Iterator[Way]:
    """A namespace of its own for the peer where that can be had, else loopback, with the reason in `network`.
    What was made is removed at the end, and by the next run should this one be killed.
    """
    reason = _hindrance()
    if reason:
        yield Way(LOOPBACK.host, (), f"loopback: {reason}")
        return
    with contextlib.ExitStack() as stack:
        try:
            way = stack.enter_context(_joined())
        except AnabranchError as error:
            way = Way(LOOPBACK.host, (), f"loopback: {error.message}")
        yield way


def _hindrance() -> str:
    if os.geteuid() != 0:
        return "only root makes network namespaces"
    return "" if shutil.which("ip") else "`ip` is not installed"


@contextlib.contextmanager
def _joined() -> Iterator[Way]:
    """Raises Unavailable where the system refuses."""
    _remove_left()
    name, outside, inside = f"{_NAME}{os.getpid()}", f"abo{os.getpid()}", f"abi{os.getpid()}"
    with _ended_by_signals():
        try:
            _ip("netns", "add", name)
            _ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name)
            _ip("addr", "add", f"{_OUR_ADDRESS}/30", "dev", outside)
            _ip("link", "set", outside, "up")
            _ip("-n", name, "addr", "add", f"{_PEER_ADDRESS}/30", "dev", inside)
            _ip("-n", name, "link", "set", inside, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            prefix = ("ip", "netns", "exec", name)
            yield Way(_PEER_ADDRESS, prefix, "veth pair between two network namespaces")
        finally:
            _remove(name)


def _remove_left() -> None:
    """Namespaces of benches that were killed."""
    for line in _ip("netns", "list").splitlines():
        name = (line.split() or [""])[0]
        number = name.removeprefix(_NAME)
        if name.startswith(_NAME) and number.isdecimal() and not os.path.exists(f"/proc/{number}"):
            _remove(name)


def _remove(name: str) -> None:
    """A namespace with its end of the pair, and so the pair."""
    with contextlib.suppress(Unavailable):  # it was never made
        _ip("netns", "delete", name)
    # The namespace itself goes when its last process has; the pair need not wait for that.
    with contextlib.suppress(Unavailable):
        _ip("link", "delete", f"abo{name.removeprefix(_NAME)}")


def _ip(*arguments: str) -> str:
    try:
        ran = subprocess.run(
            ["ip", *arguments], check=True, capture_output=True, text=True, timeout=_IP_TIMEOUT_S
        )
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"`ip {' '.join(arguments)}`: {error.stderr.strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"`ip {' '.join(arguments)}`: {error}") from error
    return ran.stdout


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind as Ctrl-C does, so that what was made is removed."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
