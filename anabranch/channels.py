"""The connections of a client, which come and go with its gateways."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Generic, TypeVar

from anabranch.addresses import Gateway
from cluster.clock import Clock, monotonic
from cluster.errors import Unavailable

_Channel = TypeVar("_Channel")


@dataclass
class _Connection(Generic[_Channel]):
    channel: _Channel
    used_until_s: float


class Channels(Generic[_Channel]):
    """One channel to each gateway that was asked; threads may share it.

    Closing a channel cuts its calls. Every call has a deadline: when that of the last one is over, a channel
    to a gateway that is no more can be closed.
    """

    def __init__(self, connect: Callable[[Gateway], _Channel], clock: Clock = monotonic) -> None:
        self._connect = connect
        self._clock = clock
        self._connections: dict[Gateway, _Connection[_Channel]] = {}
        self._is_closed = False
        self._lock = threading.Lock()

    def to(self, gateway: Gateway, call_s: float) -> _Channel:
        """The channel for a call that ends within `call_s`. Raises Unavailable when all were closed."""
        with self._lock:
            if self._is_closed:
                raise Unavailable("the client is closed")
            until_s = self._clock() + call_s
            connection = self._connections.get(gateway)
            if connection is None:
                connection = self._connections[gateway] = _Connection(self._connect(gateway), until_s)
            connection.used_until_s = max(connection.used_until_s, until_s)
            return connection.channel

    def take_unneeded(self, known: Container[Gateway]) -> list[_Channel]:
        """Channels to close: to gateways that are not known any more, and without a call."""
        with self._lock:
            now_s = self._clock()
            over = [
                gateway
                for gateway, connection in self._connections.items()
                if gateway not in known and connection.used_until_s < now_s
            ]
            return [self._connections.pop(gateway).channel for gateway in over]

    def take_all(self) -> list[_Channel]:
        """Channels to close, as there will be no call any more."""
        with self._lock:
            self._is_closed = True
            channels = [connection.channel for connection in self._connections.values()]
            self._connections.clear()
            return channels
