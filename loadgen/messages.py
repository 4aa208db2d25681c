"""What the pool and its senders say to each other, over one pipe for each sender."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from loadgen.drivers.interface import Target
from loadgen.plan import Stage
from loadgen.prompts import Source
from loadgen.records import Record


@dataclass(frozen=True, slots=True)
class Orders:
    """What a sender is started with: its part of every stage."""

    target: Target
    source: Source
    run_id: str
    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class Begin:
    """To a sender: do stage number `stage`. `origin_s`: the monotonic clock when the run began, the same in
    all processes of a machine; `begins_s`: when the stage begins, in seconds since then.
    """

    stage: int
    origin_s: float
    begins_s: float


@dataclass(frozen=True, slots=True)
class Stop:
    """To a sender: hang up what is under way, and end."""


@dataclass(frozen=True, slots=True)
class Ready:
    """From a sender: connected; what may begin."""


@dataclass(frozen=True, slots=True)
class Refused:
    """From a sender: it cannot begin."""

    reason: str


@dataclass(frozen=True, slots=True)
class Progress:
    """From a sender, a few times a second: records since the last one, counts since the stage began."""

    records: tuple[Record, ...]
    sent: int
    under_way: int


@dataclass(frozen=True, slots=True)
class Done:
    """From a sender: its part of the stage is over, all records are sent."""

    cpu_share: float


ToSender: TypeAlias = Begin | Stop
FromSender: TypeAlias = Ready | Refused | Progress | Done
