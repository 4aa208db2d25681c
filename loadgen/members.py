"""How full a cluster's members were during a run, as a gateway tells it; asked beside the run.

What a member reports of itself is as old as its last heartbeat (`controller.heartbeat_ms`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Protocol, Self

from anabranch import Client
from anabranch.answers import Member, Topology
from cluster.errors import AnabranchError, InvalidRequest
from loadgen.drivers.interface import Target
from loadgen.pool import StageCourse, Watcher
from loadgen.records import Record

EVERY_S = 1.0
_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One member at one moment."""

    at_s: float
    """Seconds since the run began."""
    worker_id: str
    role: str
    """gateway, dense, attention or controller."""
    host: str
    running: int
    """Sequences in a dense worker's batch."""
    waiting: int
    """Sequences that wait for a place in it."""
    blocks: int
    """Blocks of KV cache a member has; 0 where it keeps none."""
    blocks_used: int
    """Those that sequences hold or were promised."""
    blocks_cached: int
    """Those kept for reuse only: given up when room is needed."""

    @classmethod
    def of(cls, at_s: float, member: Member) -> Self:
        """What a member said."""
        account = member.blocks
        return cls(
            round(at_s, 3),
            member.worker_id,
            member.role,
            member.host,
            member.sequences_running,
            member.sequences_waiting,
            account.capacity if account else 0,
            account.capacity - account.free - account.sealed_cached if account else 0,
            account.sealed_cached if account else 0,
        )

    def to_line(self) -> str:
        """JSON without a newline."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_line(cls, line: str) -> Self:
        """What `to_line` wrote. Raises InvalidRequest where it did not."""
        try:
            return cls(**json.loads(line))
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"not a line of members' samples: {error}") from error


class Asked(Protocol):
    """Who knows the members: `anabranch.Client`."""

    def topology(self) -> Topology:
        """The cluster now. Raises an error of cluster.errors."""
        ...

    def close(self) -> None:
        """Leave."""
        ...


class MemberWatch:
    """A `Watcher` that also asks for the members once a second; at most one question is under way.

    What is not answered is left out: a run is not spoilt by what only looks on. To be left with `close`.
    """

    def __init__(self, watcher: Watcher, client: Asked, keep: Callable[[Sample], None]) -> None:
        self._watcher = watcher
        self._client = client
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, "members")
        self._question: Future[None] | None = None
        self._asked_s: float | None = None

    @classmethod
    def over(cls, watcher: Watcher, target: Target, keep: Callable[[Sample], None]) -> Self:
        """Asks the target's gateways."""
        client = Client(
            target.addresses,
            api_key=target.api_key,
            tls=target.tls,
            timeout_s=_PATIENCE_S,
            outage_s=_PATIENCE_S,
        )
        return cls(watcher, client, keep)

    def heard(self, record: Record) -> None:
        """See `Watcher`."""
        self._watcher.heard(record)

    def looked(self, course: StageCourse, now_s: float) -> None:
        """See `Watcher`."""
        is_due = self._asked_s is None or now_s - self._asked_s >= EVERY_S
        if is_due and (self._question is None or self._question.done()):
            if self._question is not None:
                self._question.result()  # a fault of ours in it is not swallowed
            self._asked_s = now_s
            self._question = self._thread.submit(self._ask, now_s)
        self._watcher.looked(course, now_s)

    def close(self) -> None:
        """Wait for the last answer, and leave."""
        self._thread.shutdown()
        self._client.close()

    def _ask(self, now_s: float) -> None:
        try:
            members = self._client.topology().members
        except AnabranchError:
            members = ()
        for member in members:
            self._keep(Sample.of(now_s, member))
