"""What a run will do, decided before it begins: stages of sessions, and each sender's part of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loadgen.workload import Session, counted


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a run that is summed up by itself; stages follow each other when all is answered.

    Open loop (`concurrency` None): sessions begin at their moments, whatever the server does. Closed loop:
    that many users each begin the next session when their last one is over, until `duration_s`.
    """

    name: str
    sessions: tuple[Session, ...]
    warm_up_s: float
    concurrency: int | None = None
    duration_s: float | None = None
    request_rate: float | None = None

    @property
    def requests(self) -> int:
        """Requests of all sessions."""
        return counted(self.sessions)

    def part(self, sender: int, senders: int) -> Stage:
        """What one of several senders does. Sessions are dealt like cards, to users first in a closed loop:
        who does what depends on nothing that happens in the run.
        """
        if self.concurrency is None:
            return replace(self, sessions=self.sessions[sender::senders])
        users = range(sender, self.concurrency, senders)
        mine = tuple(
            session for place, session in enumerate(self.sessions) if place % self.concurrency in users
        )
        return replace(self, sessions=mine, concurrency=len(users))


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole run."""

    stages: tuple[Stage, ...]
    notes: tuple[str, ...]
    """What was changed on the way from what was asked for: said before the run, and in its report."""
    workload: Mapping[str, Any]
    """See `workload.described`."""
