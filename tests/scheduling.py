"""A small scheduler and an engine's answers to it, for the tests of the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cluster.policies.scheduler import Row, Scheduler, SchedulerLimits, StepPlan
from cluster.types import SequenceKey

LIMITS = SchedulerLimits(
    step_tokens=16,
    max_batch=4,
    max_waiting=8,
    reserve_ahead_tokens=4,
    max_sequence_length=1000,
    room_retry_s=0.1,
    room_patience_s=1.0,
)
A, B, C, D = (SequenceKey(name) for name in "abcd")


def scheduler(**changes: Any) -> Scheduler:
    """A scheduler with LIMITS, changed."""
    return Scheduler(replace(LIMITS, **changes))


def submit(
    subject: Scheduler, key: SequenceKey, length: int, *, priority: int = 0, more: int = 100, **rest: Any
) -> None:
    """Submit at time 0 without a deadline unless changed."""
    subject.submit(key, length, priority, rest.pop("deadline_s", 1e9), 0.0, max_length=length + more, **rest)


def grant(subject: Scheduler, plan: StepPlan) -> None:
    """Answer every room request with one shard."""
    for request in plan.room:
        assert subject.granted(request, [(request.first, request.end)])


def apply(subject: Scheduler, plan: StepPlan) -> None:
    """The step went well and one token came of each sampling row."""
    subject.apply(plan, {row.key: 1 for row in plan.rows if row.samples})


def admitted(subject: Scheduler, now_s: float = 0.0) -> StepPlan:
    """The plan after the room it takes was granted."""
    grant(subject, subject.plan(now_s))
    return subject.plan(now_s)


def spans(rows: Sequence[Row]) -> list[tuple[str, int, int]]:
    """(request, start, count) of each row."""
    return [(row.key.request_id, row.start, row.count) for row in rows]
