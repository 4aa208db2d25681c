"""Several hosts on one machine: network namespaces joined by a bridge, each with a name of its own.

They share the file system, so that the checkout may lie anywhere; tests between hosts offer no lanes over
unix sockets.
"""

import contextlib
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Host:
    """One host: processes started on it see its network and its name only."""

    namespace: str
    address: str

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command as on this host; the caller ends it."""
        prefix = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
        script = 'hostname "$0" && exec "$@"'
        return subprocess.Popen([*prefix, "bash", "-c", script, self.namespace, *command], **options)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


def _add_host(switch: str, name: str, address: str) -> Host:
    outside, inside = f"p{name[-6:]}", f"e{name[-6:]}"
    _ip("netns", "add", name)
    _ip("link", "add", inside, "type", "veth", "peer", "name", outside)
    _ip("link", "set", outside, "netns", switch)
    _ip("link", "set", inside, "netns", name)
    _ip("-n", switch, "link", "set", outside, "master", "br0", "up")
    _ip("-n", name, "addr", "add", f"{address}/24", "dev", inside)
    for device in ("lo", inside):
        _ip("-n", name, "link", "set", device, "up")
    return Host(name, address)


@contextlib.contextmanager
def network(hosts: int) -> Iterator[tuple[Host, ...]]:
    """`hosts` hosts on one bridge, 10.77.0.10 and up; everything is removed at the end."""
    tag = uuid.uuid4().hex[:4]
    switch = f"anabranch-s{tag}"
    made = [switch]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        result = []
        for index in range(hosts):
            made.append(f"anabranch-h{tag}{index}")
            result.append(_add_host(switch, made[-1], f"10.77.0.{10 + index}"))
        yield tuple(result)
    finally:
        for name in reversed(made):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20)
