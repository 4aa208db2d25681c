"""The fixed ports of a configuration: distinct, and free before anything is started."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from cluster.config import Config
from cluster.errors import ConfigError, Unavailable


def require_free(config: Config) -> None:
    """Fail early where a role would fail later, and again at each new start.

    Only for a cluster on this machine. Raises ConfigError when two servers are given one port, and
    Unavailable naming the key whose port somebody else has.
    """
    owners: dict[int, str] = {}
    for key, host, port in _fixed(config):
        if port in owners:
            raise ConfigError(f"{key} and {owners[port]} both come to port {port}; replica i adds i to each")
        owners[port] = key
        try:
            _try_bind(host, port)
        except OSError as error:
            raise Unavailable(
                f"{key}: {host}:{port} is in use ({error.strerror}); choose another port"
            ) from error


def _fixed(config: Config) -> Iterator[tuple[str, str, int]]:
    """(key, host, port) of every server whose port is not drawn."""
    if config.controller.port:
        yield "controller.port", config.controller.host, config.controller.port
    gateway, dense, attention = config.gateway, config.dense, config.attention
    for key, host, port, replicas in (
        ("gateway.port", gateway.host, gateway.port, gateway.replicas),
        ("gateway.http_port", gateway.host, gateway.http_port, gateway.replicas),
        ("dense.port", dense.host, dense.port, dense.replicas),
        ("attention.port", attention.host, attention.port, attention.replicas * len(attention.every_tier)),
    ):
        if port:
            for i in range(replicas):
                yield key, host, config.port(port, i)


def _try_bind(host: str, port: int) -> None:
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left is free
        probe.bind(address)
