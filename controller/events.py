"""What happens to a cluster, as values for whoever watches: a log, a terminal, a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from controller.slots import Slot
from controller.state import ClusterRecord


@dataclass(frozen=True, slots=True)
class Opened:
    """The control server answers at this address, and Ray has this many nodes."""

    address: str
    nodes: int


@dataclass(frozen=True, slots=True)
class SlotChanged:
    """A slot entered another phase, started its process, or has another problem."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class ClusterReady:
    """Every slot serves; clients may come. Said again when a gateway comes back elsewhere."""

    record: ClusterRecord


@dataclass(frozen=True, slots=True)
class Stopping:
    """The cluster drains; open streams have this long."""

    grace_s: float


Event = Opened | SlotChanged | ClusterReady | Stopping
Observer = Callable[[Event], None]
"""Called on the controller's thread; must not block."""
