"""A Ray cluster of several nodes on this machine, each a tree of processes that can be killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.controlled import await_
from tests.integration.clusters import alive, descendants
from tests.redis_server import free_port

_RAY = Path(sys.executable).with_name("ray")
_SPARING = ("--disable-usage-stats", "--include-log-monitor=false", "--object-store-memory=80000000")
_SPARING_HEAD = ("--include-dashboard=false", "--no-monitor")
"""Processes less, each of which takes a second of a core to start."""


class RayNodes:
    """A head, on which no role has room, and nodes that have; `address` is what a controller joins."""

    def __init__(self, folder: Path, redis: str | None = None) -> None:
        """`redis` (HOST:PORT) keeps what the head knows."""
        self._folder = folder
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"
        own = {
            "RAY_AUTH_MODE": "disabled",
            "RAY_prestart_worker_first_driver": "0",  # eight idle processes for each controller that comes
        }
        if redis is not None:
            own |= {"RAY_REDIS_ADDRESS": redis, "RAY_external_storage_namespace": "tests"}
        self.environment = os.environ | own
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._head: subprocess.Popen[bytes] | None = None

    def start_head(self) -> None:
        """Start the head, again if it was killed."""
        ports = (f"--port={self._port}", f"--ray-client-server-port={free_port()}")
        self._head = self._start(
            "--head", *ports, "--num-cpus=0", f"--temp-dir={self._folder}", *_SPARING_HEAD
        )
        await_(self._head_answers, lambda: (self._folder / "ray.log").read_text())

    def add_node(self) -> None:
        """Start a node with room for a few roles."""
        self._nodes.append(self._start(f"--address={self.address}", "--num-cpus=8"))

    def kill_head(self) -> None:
        """SIGKILL of everything on it."""
        assert self._head is not None
        _kill(self._head)
        # `ray start --head` refuses where this names the address that nodes on the same machine look for.
        (self._folder / "ray_current_cluster").unlink()

    def stop(self) -> None:
        """End everything."""
        for node in (*self._nodes, *([self._head] if self._head else [])):
            _kill(node)

    def _head_answers(self) -> bool:
        assert self._head is None or self._head.poll() is None, (self._folder / "ray.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        with (self._folder / "ray.log").open("ab") as log:
            return subprocess.Popen(
                [_RAY, "start", "--block", *words, *_SPARING], stdout=log, stderr=log, env=self.environment
            )


def _kill(node: subprocess.Popen[bytes]) -> None:
    processes = descendants(node.pid)
    node.kill()
    node.wait()
    for number in alive(processes):
        os.kill(number, signal.SIGKILL)
    await_(lambda: not alive(processes))


@contextmanager
def ray_nodes(nodes: int, redis: str | None = None) -> Iterator[RayNodes]:
    """A cluster that runs; gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="anabranch-test-", dir="/tmp"))  # paths of sockets must be short
    cluster = RayNodes(folder, redis)
    try:
        cluster.start_head()
        for _ in range(nodes):
            cluster.add_node()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
