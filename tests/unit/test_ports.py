"""Which ports a configuration fixes, and what is refused before anything starts."""

import socket
from typing import Any

import pytest

from cluster import config as configuration
from cluster.errors import ConfigError
from controller.ports import require_free
from tests.redis_server import free_port


def _config(**settings: Any) -> configuration.Config:
    drawn = {"controller.port": 0, "gateway.port": 0, "gateway.http_port": None}
    return configuration.load(
        None, drawn | {key.replace("__", "."): value for key, value in settings.items()}
    )


def _free_ports(count: int) -> int:
    """The first of so many free ones in a row."""
    for _ in range(100):
        first = free_port()
        try:
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
        except (OSError, OverflowError):
            continue
        return first
    raise AssertionError("no ports in a row are free")


@pytest.mark.parametrize("role", ["dense", "attention"])
def test_a_worker_port_that_somebody_has_is_named(role: str) -> None:
    """Before the process would fail with it, again and again."""
    taken = free_port()
    with pytest.raises(ConfigError, match=rf"{role}\.port"):
        require_free(_config(**{"controller__port": taken, f"{role}__port": taken}))


def test_replicas_on_one_machine_need_ports_of_their_own() -> None:
    """Addresses of their own are what processes on one machine do not have."""
    settings = {"attention__replicas": 2, "attention__port": _free_ports(2)}
    require_free(_config(**settings))
    with pytest.raises(ConfigError, match="both come to port"):
        require_free(_config(**settings, placement__own_addresses=True))


def test_every_arena_of_a_worker_has_a_port() -> None:
    """Two workers of two arenas take four ports one after the other."""
    first = _free_ports(4)
    settings = {"attention__replicas": 2, "attention__port": first, "attention__tiers": [{"arena": "1MiB"}]}
    with pytest.raises(ConfigError, match=rf"both come to port {first + 3}"):
        require_free(_config(**settings, dense__port=first + 3))
