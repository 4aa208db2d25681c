"""Where Prometheus reads the controller."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from cluster import telemetry
from cluster.config import Config
from cluster.health import OwnHealth
from cluster.telemetry import logger

_OFFSET = 99  # gateways come before, dense workers behind
_log = logger("controller")


def serve_metrics(config: Config, registry: CollectorRegistry, address: str) -> None:
    """Serve a registry, and the health of the control server at `address`, if telemetry.metrics_port says so;
    a port that is taken is replaced by a free one.
    """
    base = config.telemetry.metrics_port
    if base is None:
        return
    host = config.controller.host
    problem = OwnHealth(address, config.security.tls).problem
    try:
        port = telemetry.serve_metrics(registry, host, config.port(base, _OFFSET), problem)
    except (OSError, OverflowError):  # taken, or beyond the last port
        port = telemetry.serve_metrics(registry, host, 0, problem)
    _log.info("metrics", host=host, port=port)
