"""Where a client's gateways are: a name of `dns:///` becomes the addresses it stands for, again and again."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from cluster.clock import Clock, monotonic
from cluster.errors import InvalidRequest, Unavailable

_SCHEME = "dns:///"
_AGE_S = 5.0
"""What Kubernetes' name server says holds so long by itself; and a pod that ends is named no more for as long
before it is told (preStop).
"""

LOOKUP_S = 5.0
"""Longest wait for a name server."""

Resolve = Callable[[str, int], Sequence[str]]
"""(name, port) -> host:port of every gateway behind the name, one at least; raises OSError."""

Lookup = Future[Unavailable | None]
"""A lookup under way; its result is how it failed."""


class Gateway(NamedTuple):
    """One gateway: host:port, and the name its certificate must bear where that is not the host."""

    address: str
    server_name: str | None = None


def system_addresses(name: str, port: int) -> list[str]:
    """What this machine's resolver knows of a name: IPv4, which gateways bind unless told otherwise, else
    IPv6. With addresses of both a gateway would be taken for two. Raises OSError.
    """
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    families = {family for family, _, _, _, _ in found}
    chosen = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    hosts = [str(where[0]) for family, _, _, _, where in found if family == chosen]
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts]


class Addresses:
    """The gateways of one client, as they are known now; threads may share it.

    Lookups have a thread, since the system's resolver knows no deadline; there is one at a time. What it
    found holds until the next one succeeds. A name that was not found yet stands for itself: gRPC then looks
    it up, and tells what is wrong.
    """

    def __init__(self, given: Sequence[str], resolve: Resolve, clock: Clock = monotonic) -> None:
        """`given`: host:port or dns:///name:port. Raises InvalidRequest when that is none of them."""
        if not given or not all(given):
            raise InvalidRequest("give the address of at least one gateway, as host:port or dns:///name:port")
        self._given = tuple(given)
        self._names = {each: _name_and_port(each) for each in given if each.startswith("dns:")}
        self._resolve = resolve
        self._clock = clock
        self._order = random.Random().random()  # noqa: S311  # spreads load, hides nothing
        self._found: dict[str, tuple[Gateway, ...]] = {}
        self._lock = threading.Lock()  # over the following two
        self._lookup: Lookup = Future()
        self._looked_s = clock()
        self._lookup.set_result(None)
        self.first_lookup = self.look_up()

    def known(self) -> tuple[Gateway, ...]:
        """Every gateway; what is older than some seconds is looked up meanwhile."""
        self.look_up(_AGE_S)
        each = (gateway for given in self._given for gateway in self._found.get(given, (Gateway(given),)))
        return tuple(dict.fromkeys(each))

    def look_up(self, age_s: float = 0.0) -> Lookup:
        """The lookup under way, or the last one; one begins if that is older than `age_s`."""
        with self._lock:
            is_due = self._clock() - self._looked_s >= age_s
            if self._names and is_due and self._lookup.done():
                self._lookup, self._looked_s = Future(), self._clock()
                threading.Thread(target=self._run, args=(self._lookup,), name="names", daemon=True).start()
            return self._lookup

    def _run(self, lookup: Lookup) -> None:
        failure = None
        for given, (name, port) in self._names.items():
            try:
                found = self._resolve(name, port)
            except (OSError, UnicodeError) as error:
                failure = Unavailable(f"{name} cannot be looked up: {error}")
            else:
                self._found[given] = tuple(Gateway(each, f"{name}:{port}") for each in self._ordered(found))
        lookup.set_result(failure)

    def _ordered(self, found: Sequence[str]) -> list[str]:
        """In an order that is this client's own, lest all begin at the same gateway, and stays the same from
        lookup to lookup, so that turns go round.
        """
        return sorted(found, key=lambda address: hash((self._order, address)))


def doubt(lookup: Lookup) -> Unavailable | None:
    """Why the addresses may not be those of now, as far as the lookup says by now."""
    return lookup.result() if lookup.done() else Unavailable(f"no name server answered in {LOOKUP_S:g} s")


def _name_and_port(given: str) -> tuple[str, int]:
    name, _, port = given.removeprefix(_SCHEME).rpartition(":")
    if not given.startswith(_SCHEME) or not name or "/" in name or not port.isdecimal():
        raise InvalidRequest(f"{given}: a name of several gateways is written as dns:///name:port")
    return name, int(port)
