"""The driver of a target."""

from __future__ import annotations

from loadgen.drivers.interface import Driver, Target


def open_driver(target: Target) -> Driver:
    """The driver that speaks the target's API. Raises ConfigError where what it needs is not installed."""
    if target.url:
        from loadgen.drivers.openai_api import OpenAiDriver  # httpx: an extra

        return OpenAiDriver(target)
    from loadgen.drivers.grpc_api import GrpcDriver

    return GrpcDriver(target)
