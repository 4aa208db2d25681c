"""Where Prometheus reads the controller."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from cluster import telemetry
from cluster.config import Config
from cluster.telemetry import logger

_OFFSET = 99  # gateways come before, dense workers behind
_log = logger("controller")


def serve_metrics(config: Config, registry: CollectorRegistry) -> None:
    """Serve a registry if telemetry.metrics_port says so; a port that is taken is replaced by a free one."""
    base = config.telemetry.metrics_port
    if base is None:
        return
    host = config.controller.host
    try:
        port = telemetry.serve_metrics(registry, host, config.port(base, _OFFSET))
    except (OSError, OverflowError):  # taken, or beyond the last port
        port = telemetry.serve_metrics(registry, host, 0)
    _log.info("metrics", host=host, port=port)
