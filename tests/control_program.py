"""A controller in a process of its own, without Ray: membership, registry, and nobody it started.

`python -m tests.control_program CONFIG`. Ends with SIGTERM.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from anabranch.wire import geometry_message
from cluster import config as configuration
from cluster.model_spec import ModelSpec
from cluster.telemetry import configure_logging
from cluster.types import draw_epoch
from controller.membership import MembershipTable, Terms
from controller.registry_writer import registry_writer
from controller.service import CONTROLLER_ID, ControlServer, ControlService
from workers.role import stop_on_signals


def main(file: str) -> None:
    """Serve until told to stop."""
    config = configuration.load(Path(file))
    configure_logging(config.telemetry, role="controller", worker=CONTROLLER_ID)
    stop = threading.Event()
    stop_on_signals(stop)
    controller = config.controller
    table = MembershipTable(Terms(config.digest, controller.heartbeat_ms, controller.expiry_ms))
    geometry = ModelSpec.from_folder(Path(config.model.path)).geometry(
        config.model.dtype, config.attention.block_tokens
    )
    service = ControlService(
        table, draw_epoch(), geometry_message(geometry), tuple, lambda _grace_ms: stop.set()
    )
    with registry_writer(config, table, service.directory, on_taken=service.step_down) as writer:
        server = ControlServer(config, service)
        writer.claim(service.welcome(), f"127.0.0.1:{server.port}", config.digest)
        writer.start()
        while not stop.wait(controller.heartbeat_ms / 1000):
            table.sweep(frozen=writer.is_away)
            service.sweep()
        server.stop()


if __name__ == "__main__":
    main(sys.argv[1])
