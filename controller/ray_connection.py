"""How this process comes to Ray: a private cluster that it starts, or one that it joins."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent import futures

import ray
from ray._private import ray_constants

from cluster.config import Config
from cluster.errors import ConfigError, Unavailable
from controller.ray_folder import RayFolder

_LOOPBACK = "127.0.0.1"
_OBJECT_STORE_BYTES = 80 * 2**20  # close to the least Ray accepts; nothing of ours goes there
_PROBE_S = 5.0


class RayConnection:
    """Owns the connection, of which a process has one, and the private cluster if it started one.

    That is on loopback, guarded by a random token, without dashboard. What it starts ends with `close`.
    """

    def __init__(self, config: Config, cpus: int) -> None:
        """Connect. `cpus` is what a private cluster claims to have.

        Raises Unavailable when no cluster answers at `ray.address`, ConfigError for an unusable one.
        """
        self._folder: RayFolder | None = None
        # On the main thread Ray would take SIGTERM for itself. The thread lives as long as Ray: the kernel
        # ends Ray's processes with the thread that started them.
        self._starter = futures.ThreadPoolExecutor(1, thread_name_prefix="ray")
        try:
            self._starter.submit(self._connect, config, cpus).result()
        except BaseException:
            self.close()
            raise
        if threading.current_thread() is threading.main_thread():
            # Ray's own handler calls the one there was, and aborts the process three seconds later.
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))

    def close(self) -> None:
        """Leave, or end the private cluster. Idempotent."""
        ray.shutdown()
        self._starter.shutdown()
        if self._folder is not None:
            self._folder.remove()

    def _connect(self, config: Config, cpus: int) -> None:
        if config.ray.address is None:
            self._folder = RayFolder()
            _start_private(cpus, self._folder)
        else:
            _join(config.ray.address, f"anabranch-{config.registry.cluster}")


def first_line(error: BaseException) -> str:
    """What to tell of an error of Ray's, whose messages go on with tracebacks."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _start_private(cpus: int, folder: RayFolder) -> None:
    """Start a cluster of this machine alone, which keeps its files in the folder."""
    # Ray reads these once per process, so they stay; the token is in no file.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray._raylet.Config.initialize("")  # it was read when Ray was imported
    try:
        with _loopback_believed(), _warnings_kept_back():
            ray.init(
                num_cpus=cpus,
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _node_ip_address=_LOOPBACK,
                _temp_dir=str(folder.files),
                _system_config={"prestart_worker_first_driver": False},
            )
    except Exception as error:  # Ray raises bare ones here
        raise Unavailable(f"a private Ray cluster did not start: {first_line(error)}") from error


def _join(address: str, namespace: str) -> None:
    if address.startswith("ray://"):
        raise ConfigError(
            "ray.address: give the cluster's own address (HOST:6379), not that of a Ray client server"
        )
    _require_listener(address)
    try:
        with _warnings_kept_back():
            ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises bare ones here
        raise Unavailable(f"cannot join the Ray cluster at {address}: {first_line(error)}") from error


def _require_listener(address: str) -> None:
    """Fail in seconds where nobody listens; Ray itself takes minutes to say so."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # "auto" and its like
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PROBE_S).close()
    except OSError as error:
        raise Unavailable(f"no Ray cluster answers at {address}: {error}") from error


@contextlib.contextmanager
def _loopback_believed() -> Iterator[None]:
    """Let Ray stay on loopback: it replaces 127.0.0.1 by an outside address and listens on all
    interfaces, unless it believes that clusters of several machines are not possible here.
    """
    believed = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = believed


@contextlib.contextmanager
def _warnings_kept_back() -> Iterator[None]:
    """Ray warns, before it takes its logging level, that off the main thread it catches no SIGTERM: that
    is what we want.
    """
    log = logging.getLogger("ray._private.worker")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
