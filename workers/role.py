"""What every role process does before and around its own work.

A role's `__main__` is `leave(role.run("dense", serve))`: arguments, configuration, logging, signals
and the translation of errors into one line and an exit status happen here. No torch.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry

from cluster import config as configuration
from cluster import fault_points
from cluster.config import Config
from cluster.errors import AnabranchError, ConfigError, ModelError, Unavailable, VersionMismatch
from cluster.health import OwnHealth
from cluster.signals import Interrupts
from cluster.telemetry import EventLogger, configure_logging, logger, serve_metrics
from cluster.types import Epoch, WorkerId, draw_epoch

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_REFUSED = 2
"""The configuration or the model cannot be served: starting again would not help."""

_METRICS_OFFSET = {"gateway": 0, "dense": 100, "attention": 2000}
"""What each role adds to `telemetry.metrics_port`, beside its index: roles may share a machine."""

_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104  (compared with, not bound)

_EPILOG = """\
Role processes are normally started by `anabranch up`. By hand, each in its own terminal, with the same
file for all (the controller refuses a process whose file differs, and names the difference):

  python -m controller --config cluster.yaml
  python -m workers.{role} --config cluster.yaml --worker-id {role}-0 --index 0 --controller 127.0.0.1:8600

The file's keys are listed in cluster/config.py. SIGTERM or Ctrl-C drains: what is open is finished
within controller.drain_grace_s, or the time that `anabranch drain` or `down` asked for; a second signal
ends the process at once.
Exit status: 0 drained; 1 failed; 2 configuration or model refused.
"""


@dataclass(frozen=True)
class RoleContext:
    """Who this process is, what it was told, and when it must stop."""

    role: str
    config: Config
    worker_id: WorkerId
    index: int
    epoch: Epoch
    controller: str
    stop: threading.Event = field(default_factory=threading.Event)
    log: EventLogger = field(default_factory=lambda: logger("role"))

    def reachable(self, host: str, port: int) -> str:
        """host:port at which others reach a server bound to `host`; a wildcard becomes the own
        address on the way to the controller. Raises Unavailable where there is no way.
        """
        if host in _WILDCARDS:
            host = _address_towards(self.controller)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def serve_metrics(self, registry: CollectorRegistry, host: str, grpc_port: int) -> str:
        """Serve Prometheus if telemetry.metrics_port says so, and there the health of the gRPC server that
        is bound to `host` and `grpc_port`; returns the address for others, or nothing.

        A port that is taken (by another cluster on this machine, say) is replaced by a free one. Raises
        Unavailable as `reachable` does.
        """
        base = self.config.telemetry.metrics_port
        if base is None:
            return ""
        health = OwnHealth(self.reachable(host, grpc_port), self.config.security.tls)
        wanted = self.config.port(base, _METRICS_OFFSET[self.role] + self.index)
        try:
            port = serve_metrics(registry, host, wanted, health.problem)
        except (OSError, OverflowError):  # taken, or beyond the last port
            port = serve_metrics(registry, host, 0, health.problem)
        self.log.info("metrics", host=host, port=port)
        return self.reachable(host, port)


def _address_towards(peer: str) -> str:
    """The local address from which `peer` (host:port) is reached; sends nothing.

    Raises Unavailable where its name is unknown, or nothing leads there.
    """
    host, _, port = peer.rpartition(":")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[
            0
        ]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise Unavailable(f"--controller {peer}: no way there: {error.strerror}") from error


def parse(role: str, argv: Sequence[str] | None = None) -> RoleContext:
    """Arguments and configuration to a context; sets up logging and the signals of the main thread.

    Raises ConfigError; wrong arguments end the process with status 2, as argparse does.
    """
    arguments = _parser(role).parse_args(argv)
    config = configuration.load(arguments.config)
    epoch = draw_epoch()
    worker_id = WorkerId(arguments.worker_id or f"{role}-{arguments.index}")
    configure_logging(config.telemetry, role=role, worker=worker_id, epoch=f"{epoch:016x}")
    if arguments.fault_points is not None:
        fault_points.arm(arguments.fault_points, worker_id)
    context = RoleContext(role, config, worker_id, arguments.index, epoch, arguments.controller)
    if threading.current_thread() is threading.main_thread():
        stop_on_signals(context.stop)
    return context


def _parser(role: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m workers.{role}",
        description=f"One {role} process of an Anabranch cluster.",
        epilog=_EPILOG.format(role=role),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="the cluster's YAML file")
    parser.add_argument("--worker-id", metavar="NAME", help=f"name of the slot; default: {role}-INDEX")
    parser.add_argument(
        "--index", metavar="N", type=int, default=0, help="number of the slot within the role, from 0"
    )
    parser.add_argument(
        "--controller", metavar="HOST:PORT", required=True, help="gRPC address of the controller"
    )
    parser.add_argument("--fault-points", metavar="SOCKET", help=argparse.SUPPRESS)  # tests' alone
    return parser


def stop_on_signals(stop: threading.Event) -> None:
    """Let SIGTERM and SIGINT set `stop`; a second one ends the process at once."""
    Interrupts(stop.set, lambda number: os._exit(128 + number)).start()


def run(role: str, serve: Callable[[RoleContext], int | None], argv: Sequence[str] | None = None) -> int:
    """Parse, serve until told to stop, and return the exit status.

    Errors of the tree become one line on standard error: the controller shows that line as the
    slot's problem. Anything else is a bug and keeps its traceback.
    """
    try:
        return serve(parse(role, argv)) or EXIT_OK
    except (ConfigError, ModelError, VersionMismatch) as error:
        return _complain(role, error, EXIT_REFUSED)
    except AnabranchError as error:
        return _complain(role, error, EXIT_FAILED)


def _complain(role: str, error: AnabranchError, status: int) -> int:
    sys.stderr.write(f"{role}: {error.message}\n")
    return status


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of this process, in bytes."""

    resident_bytes: int
    peak_bytes: int


def read_memory(status: Path = Path("/proc/self/status")) -> Memory:
    """VmRSS and VmHWM of this process; zeros where the kernel does not tell."""
    try:
        lines = status.read_text().splitlines()
    except FileNotFoundError:  # not Linux
        return Memory(0, 0)
    kibibytes = {
        name: int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in lines)
        if name in ("VmRSS", "VmHWM")
    }
    return Memory(kibibytes.get("VmRSS", 0) * 1024, kibibytes.get("VmHWM", 0) * 1024)
