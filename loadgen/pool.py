"""The sender processes of a run: started, begun together, listened to, and answered for when they are lost.

Every request of the plan is accounted for: it has a record from its sender; or its sender was lost, and the
pool writes one that says so; or it was not sent, since the run was told to stop, its stage's time was over,
or an earlier turn failed.
"""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Protocol, TypeAlias

from cluster.clock import Clock, monotonic
from cluster.errors import Unavailable
from loadgen import sender_process
from loadgen.drivers.interface import Target
from loadgen.messages import Begin, Done, FromSender, Orders, Progress, Ready, Refused, Stop, ToSender
from loadgen.plan import Plan, Stage
from loadgen.prompts import Source
from loadgen.records import Outcome, Record
from loadgen.workload import Session

SENDER_LOST = "SENDER_LOST"
"""Reason of the error in records of requests whose sender process died."""

_START_S = 60.0
_HANG_UP_S = 5.0
_LOOK_S = 0.5
_SILENCE_S = 30.0
"""A sender that does not even report that nothing happened is lost."""

_AHEAD_S = 0.1
"""From the orders to a stage's beginning: all senders have them by then."""

_Pipe: TypeAlias = "Connection[ToSender, FromSender]"


class StopSwitch:
    """Ends a run from another thread, or from a signal's."""

    def __init__(self) -> None:
        self._reading, self._writing = socket.socketpair()
        self.is_set = False

    def set(self) -> None:
        """Hang up what is under way; the run returns with what it has."""
        self.is_set = True
        self._writing.send(b"\0")

    @property
    def readable(self) -> socket.socket:
        """Has something to read once it is set."""
        return self._reading

    def close(self) -> None:
        """Give the sockets back."""
        self._reading.close()
        self._writing.close()


@dataclass(frozen=True, slots=True)
class StageCourse:
    """How a stage went. `sent` and `under_way` are over all senders, while it goes on too."""

    stage: Stage
    begins_s: float
    """In seconds since the run began."""
    sent: int = 0
    under_way: int = 0
    client_cpu_share: float = 0.0


class Watcher(Protocol):
    """What looks on."""

    def heard(self, record: Record) -> None:
        """A request ended."""
        ...

    def looked(self, course: StageCourse, now_s: float) -> None:
        """A few times a second: how a stage stands, `now_s` seconds after the run began."""
        ...


@dataclass(slots=True)
class _Member:
    """One sender process and what is known of it."""

    process: SpawnProcess
    pipe: _Pipe
    stages: tuple[Stage, ...]
    is_busy: bool = False
    heard_s: float = 0.0
    sent: int = 0
    under_way: int = 0
    cpu_share: float = 0.0
    known: set[tuple[int, int]] = field(default_factory=set)
    """(session, turn) of each record received."""


class SenderPool:
    """Runs a plan once. To be left with `close`, which ends all processes."""

    def __init__(
        self,
        plan: Plan,
        target: Target,
        source: Source,
        *,
        senders: int,
        run_id: str,
        watcher: Watcher,
        stop: StopSwitch,
        clock: Clock = monotonic,
    ) -> None:
        self._plan = plan
        self._watcher = watcher
        self._stop = stop
        self._clock = clock
        self._origin_s = 0.0
        self._was_stopped = False
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads and gRPC's state
        self._members = [
            _start(context, Orders(target, source, run_id, _parts(plan, number, senders)))
            for number in range(senders)
        ]

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Of the senders."""
        return tuple(member.process.pid or 0 for member in self._members)

    def run(self) -> list[StageCourse]:
        """Connect all senders, then do the stages. Raises Unavailable where a sender cannot begin."""
        for member in self._members:
            self._await_ready(member)
        self._origin_s = self._clock()
        courses = []
        for number, stage in enumerate(self._plan.stages):
            if self._stop.is_set:
                break
            courses.append(self._do(number, stage))
        return courses

    def close(self) -> None:
        """End all processes."""
        for member in self._members:
            member.pipe.close()  # which a sender takes for the end
        for member in self._members:
            member.process.join(_HANG_UP_S)
            if member.process.is_alive():
                member.process.kill()
                member.process.join()
            member.process.close()

    def _await_ready(self, member: _Member) -> None:
        wait([member.pipe, self._stop.readable], _START_S)
        if self._stop.is_set:
            return
        message = _receive(member) if member.pipe.poll() else None
        if isinstance(message, Refused):
            raise Unavailable(f"the senders cannot begin: {message.reason}")
        if not isinstance(message, Ready):
            raise Unavailable("a sender process did not start; what it wrote above says why")

    def _do(self, number: int, stage: Stage) -> StageCourse:
        begins_s = self._now_s() + _AHEAD_S
        for member in self._members:
            member.sent = member.under_way = 0
            member.heard_s = self._now_s()
            member.is_busy = _send(member, Begin(number, self._origin_s, begins_s))
            if not member.is_busy:
                self._answer_for(member, number, begins_s)
        while busy := [member for member in self._members if member.is_busy]:
            if self._stop.is_set and not self._was_stopped:
                self._was_stopped = True
                for member in busy:
                    _send(member, Stop())
            self._listen(busy, number, begins_s)
            self._watcher.looked(self._course(stage, begins_s), self._now_s())
        return self._course(stage, begins_s)

    def _listen(self, busy: Sequence[_Member], number: int, begins_s: float) -> None:
        """Take what has come, within `_LOOK_S`; end whoever is silent for too long."""
        waited: list[_Pipe | socket.socket] = [member.pipe for member in busy]
        if not self._was_stopped:
            waited.append(self._stop.readable)
        readable = wait(waited, _LOOK_S)
        patience_s = _HANG_UP_S if self._was_stopped else _SILENCE_S
        for member in busy:
            if member.pipe in readable:
                member.heard_s = self._now_s()
                self._take(member, _receive(member), number, begins_s)
            elif self._now_s() - member.heard_s > patience_s:
                member.process.kill()  # its pipe ends, which is heard of next
                member.heard_s = self._now_s()

    def _take(self, member: _Member, message: FromSender | None, number: int, begins_s: float) -> None:
        match message:
            case Progress():
                member.sent, member.under_way = message.sent, message.under_way
                for record in message.records:
                    member.known.add((record.session, record.turn))
                    self._watcher.heard(record)
            case Done():
                member.is_busy, member.cpu_share = False, message.cpu_share
            case _:
                member.is_busy = False
                self._answer_for(member, number, begins_s)

    def _answer_for(self, member: _Member, number: int, begins_s: float) -> None:
        """A sender is lost: each request of its part that has no record failed, unless all had to stop."""
        member.under_way = 0
        if self._was_stopped:
            return
        for session in member.stages[number].sessions:
            due_s = self._now_s() if session.at_s is None else begins_s + session.at_s
            for turn in range(len(session.turns)):
                if (session.index, turn) not in member.known:
                    self._watcher.heard(_lost(member.stages[number], session, turn, due_s, self._now_s()))

    def _course(self, stage: Stage, begins_s: float) -> StageCourse:
        return StageCourse(
            stage,
            begins_s,
            sent=sum(member.sent for member in self._members),
            under_way=sum(member.under_way for member in self._members),
            client_cpu_share=max(member.cpu_share for member in self._members),
        )

    def _now_s(self) -> float:
        return self._clock() - self._origin_s


def _parts(plan: Plan, sender: int, senders: int) -> tuple[Stage, ...]:
    return tuple(stage.part(sender, senders) for stage in plan.stages)


def _start(context: SpawnContext, orders: Orders) -> _Member:
    ours, theirs = context.Pipe()
    process = context.Process(
        target=sender_process.main, args=(theirs, orders), name="loadgen-sender", daemon=True
    )
    process.start()
    theirs.close()
    return _Member(process, ours, orders.stages)


def _send(member: _Member, message: ToSender) -> bool:
    """Whether there was anybody to send to."""
    try:
        member.pipe.send(message)
    except OSError:
        return False
    return True


def _receive(member: _Member) -> FromSender | None:
    """The next message; None from a process that has ended."""
    try:
        return member.pipe.recv()
    except (EOFError, OSError):
        return None


def _lost(stage: Stage, session: Session, turn: int, due_s: float, now_s: float) -> Record:
    return Record(
        request_id="",
        session=session.index,
        turn=turn,
        tenant=session.tenant,
        stage=stage.name,
        warm_up=False,
        outcome=Outcome.FAILED,
        intended_s=due_s,
        sent_s=None,
        first_token_s=None,
        last_token_s=None,
        ended_s=now_s,
        asked_prompt_tokens=sum(part.new_tokens for part in session.turns[: turn + 1]),
        asked_output_tokens=session.turns[turn].output_tokens,
        prompt_tokens=0,
        output_tokens=0,
        cached_tokens=0,
        finish_reason="",
        error=f"{SENDER_LOST}: its sender process ended",
        deltas_s=(),
        delta_tokens=(),
        timings=None,
    )
