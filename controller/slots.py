"""Slots and nodes: the places for processes, as values, and what the supervisor asks of others."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.policies.node_placement import Role
from controller.keeper import Launch


class Phase(enum.Enum):
    """Where a slot stands."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    ENDING = "ending"
    PAUSED = "paused"
    GIVEN_UP = "given up"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one process, and what is in it; replaced, never modified.

    `attempt` numbers the starts; what is said of an earlier attempt is ignored.
    """

    worker_id: str
    role: Role
    index: int
    phase: Phase = Phase.WAITING
    since_s: float = 0.0
    due_s: float | None = None
    attempt: int = 0
    failures: int = 0
    node: str = ""
    process_id: int = 0
    log_file: str = ""
    problem: str = ""
    retires: bool = False
    """It leaves for good: what ends here is not started again."""

    @property
    def has_process(self) -> bool:
        """Whether a process runs, or may."""
        return self.phase in (Phase.STARTING, Phase.READY, Phase.ENDING)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait and how often to try; seconds. `elastic`: nodes come and go; a slot that none can hold
    is no failure while others of its role are filled, and one that retired is for the next node.
    """

    placement_timeout_s: float
    start_timeout_s: float
    restart_backoff_s: float
    restarts_most: int
    elastic: bool = False


@dataclass(frozen=True, slots=True)
class Placed:
    """A node was found."""

    node: str


@dataclass(frozen=True, slots=True)
class NotPlaced:
    """No node has what is needed; `missing` names it."""

    missing: str


class Place(Protocol):
    """Chooses nodes. `occupied`: the slots that have a process; `suspected` nodes did not answer lately
    and are to be avoided.
    """

    def __call__(
        self, waiting: Sequence[Slot], occupied: Sequence[Slot], suspected: frozenset[str]
    ) -> Mapping[str, Placed | NotPlaced]:
        """An answer for each waiting slot, by worker id. Does not block for long."""
        ...


class Hands(Protocol):
    """Carries decisions out, without blocking; what comes of them is told to the supervisor."""

    def launch(self, slot: Slot) -> None:
        """Start the slot's process on its node: `started` and later `ended`, or `lost`."""
        ...

    def terminate(self, slot: Slot, grace_s: float) -> None:
        """SIGTERM, after the grace SIGKILL; a grace of zero is SIGKILL at once: `ended`, or `lost`."""
        ...

    def abandon(self, slot: Slot) -> None:
        """Give up the process with whatever holds it; nothing more is heard of this attempt."""
        ...


@dataclass(frozen=True, slots=True)
class Node:
    """A live machine as Ray describes it; resources in Ray's units (memory in bytes)."""

    node_id: str
    address: str
    hostname: str
    total: dict[str, float]
    available: dict[str, float]
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class Order:
    """A process to run, and what its keeper claims of its node for it."""

    launch: Launch
    cpus: float = 0.0
    gpus: float = 0.0
    memory_bytes: int = 0
    custom: tuple[tuple[str, float], ...] = ()
