"""The controller by itself: membership, prefix directory, plans of moves. Starts nobody, imports no Ray.

For where something else places and restarts processes, as Kubernetes does: they join by themselves.
"""

from __future__ import annotations

import threading
from pathlib import Path

from anabranch.wire import geometry_message
from cluster.config import Config
from cluster.errors import InvalidRequest
from cluster.model_spec import ModelSpec
from cluster.telemetry import logger
from cluster.types import draw_epoch
from controller.balancer import BalancerSettings
from controller.membership import MembershipTable, Terms
from controller.metrics import serve_metrics
from controller.registry_writer import registry_writer
from controller.roles import is_wildcard
from controller.service import ControlServer, ControlService

_log = logger("controller")


def run_alone(config: Config, address: str, stop: threading.Event) -> None:
    """Serve until told to stop; members then live on with what they last heard. `address`: host:port at which
    they reach this controller, for the registry. `config.model.path` is a folder.

    Raises ModelError, ConfigError, Unavailable (the port is taken).
    """
    controller = config.controller
    table = MembershipTable(Terms(config.digest, controller.heartbeat_ms, controller.expiry_ms))
    spec = ModelSpec.from_folder(Path(config.model.path))
    geometry = spec.geometry(config.model.dtype, config.attention.block_tokens)
    service = ControlService(
        table, draw_epoch(), geometry_message(geometry), tuple, _refuse, balancing=BalancerSettings.of(config)
    )
    with registry_writer(config, table, service.directory, on_taken=service.step_down) as writer:
        server = ControlServer(config, service)
        # Itself, not the address for others: those are led here once this is healthy.
        own = "127.0.0.1" if is_wildcard(controller.host) else controller.host
        serve_metrics(config, writer.metrics, f"{own}:{server.port}")
        writer.claim(service.welcome(), address, config.digest)
        writer.start()
        _log.info("controller_serving", port=server.port, address=address)
        while not stop.wait(controller.heartbeat_ms / 1000):
            for member in table.sweep(frozen=writer.is_away):
                _log.warning("member_silent", worker=member.worker_id)
            service.sweep()
        server.stop()


def _refuse(_grace_ms: int) -> None:
    raise InvalidRequest("this controller stops nobody: stop the processes where they were started")
