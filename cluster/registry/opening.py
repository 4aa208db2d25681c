"""Which registry a configuration asks for."""

from __future__ import annotations

from cluster.errors import ConfigError
from cluster.registry.embedded import EmbeddedRegistry
from cluster.registry.interface import Registry
from cluster.registry.settings import RegistryConfig


def open_registry(config: RegistryConfig) -> Registry:
    """The registry; nothing is connected yet. Raises ConfigError for a package or a password file that is
    missing.
    """
    if config.url is None:
        return EmbeddedRegistry(config.lease_s, config.blocks_most)
    try:
        from cluster.registry.redis_server import RedisRegistry
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"registry: {config.place} needs the package redis: pip install 'anabranch[redis]'"
        ) from error
    return RedisRegistry(config)
