"""The scheduler, claim by claim; `test_scheduler_machine` tries everything at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import AlreadyExists, DeadlineExceeded, ResourceExhausted
from cluster.policies.scheduler import RoomRequest, Row, Scheduler, SchedulerLimits, StepPlan
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


def test_a_prompt_runs_in_chunks_and_samples_at_its_end() -> None:
    """Chunks fill the budget; only the one that reaches the last known token samples."""
    subject = scheduler()
    submit(subject, A, 20)
    first = admitted(subject)
    assert [(row.start, row.count, row.samples) for row in first.rows] == [(0, 16, False)]
    apply(subject, first)
    second = subject.plan(0.0)
    assert [(row.start, row.count, row.samples) for row in second.rows] == [(16, 4, True)]
    apply(subject, second)
    assert spans(subject.plan(0.0).rows) == [("a", 20, 1)]


def test_one_token_rows_come_first_and_chunks_take_the_rest() -> None:
    """A long prompt never delays a running stream: it gets what the budget leaves."""
    subject = scheduler()
    submit(subject, A, 1)
    apply(subject, admitted(subject))
    submit(subject, B, 100, priority=-1)
    assert spans(admitted(subject).rows) == [("a", 1, 1), ("b", 0, 15)]


def test_a_chunk_stays_within_one_shard() -> None:
    """Granted as two shards, a prompt is cut at the edge between them."""
    subject = scheduler()
    submit(subject, A, 12)
    (request,) = subject.plan(0.0).room
    assert (request.first, request.end) == (0, 16)
    assert subject.granted(request, [(0, 5), (5, 16)])
    first = subject.plan(0.0)
    assert spans(first.rows) == [("a", 0, 5)]
    apply(subject, first)
    assert spans(subject.plan(0.0).rows) == [("a", 5, 7)]


def test_a_partial_grant_is_kept_and_the_rest_asked_for() -> None:
    """Room may come in pieces: what is missing is asked for next."""
    subject = scheduler()
    submit(subject, A, 12)
    (request,) = subject.plan(0.0).room
    assert subject.granted(request, [(0, 8)])
    plan = subject.plan(0.0)
    assert plan.rows == ()
    assert [(item.first, item.end) for item in plan.room] == [(8, 16)]


def test_room_is_asked_for_ahead_and_not_for_every_token() -> None:
    """A decoding sequence asks once per `reserve_ahead_tokens`, before it needs the room."""
    subject = scheduler()
    submit(subject, A, 2, more=40)
    requests: list[RoomRequest] = []
    for _ in range(24):
        plan = subject.plan(0.0)
        assert not requests or plan.rows, "it never waits for room"
        requests += plan.room
        apply(subject, plan)
        grant(subject, plan)
    assert 5 <= len(requests) <= 7


def test_room_beyond_the_longest_output_is_never_asked_for() -> None:
    """`max_length` caps what is reserved ahead."""
    subject = scheduler()
    submit(subject, A, 10, more=2)
    (request,) = subject.plan(0.0).room
    assert request.end == 12


def test_priority_then_arrival_decide_who_is_admitted() -> None:
    """A lower priority number is sooner; equals are served as they came."""
    subject = scheduler(max_batch=2)
    for key, priority in ((A, 1), (B, 0), (C, 1), (D, 0)):
        submit(subject, key, 1, priority=priority)
    assert [request.key for request in subject.plan(0.0).room] == [B, D]


def test_nobody_overtakes_a_refused_head() -> None:
    """While the head only waits for an answer others may ask; once it was refused nobody behind it may."""
    subject = scheduler()
    submit(subject, A, 50)
    (large,) = subject.plan(0.0).room
    submit(subject, B, 1)
    assert [request.key for request in subject.plan(0.0).room] == [B]
    subject.refused(large, 0.0)
    submit(subject, C, 1)
    assert subject.plan(0.05).room == ()
    assert [request.key for request in subject.plan(0.1).room] == [A]
    assert subject.plan(0.1).room == (), "not while the head's second attempt is under way either"


def test_the_last_in_rank_gives_way_when_room_runs_out() -> None:
    """Refusal alone preempts nobody; out of room, the latest loses all and starts again later."""
    subject = scheduler()
    for key in (A, B):
        submit(subject, key, 4)
    plan = admitted(subject)
    while not plan.preempted:
        apply(subject, plan)
        for request in plan.room:
            subject.refused(request, 0.0)
        assert subject.running == 2
        plan = subject.plan(0.0)
    assert plan.preempted == (B,)
    assert [request.key for request in plan.room] == [A], "the winner asks again at once"
    assert (subject.running, subject.waiting, subject.preemptions) == (1, 1, 1)
    assert subject.generation(B) == 1
    grant(subject, plan)
    readmission = subject.plan(0.1)
    assert [(item.key, item.generation, item.first) for item in readmission.room] == [(B, 1, 0)]
    grant(subject, readmission)
    rows = {row.key: row for row in subject.plan(0.0).rows}
    assert (rows[B].start, rows[B].generation, rows[B].samples) == (0, 1, True)
    assert rows[B].count > 4, "outputs so far are recomputed with the prompt"


def test_the_last_in_rank_gives_way_itself() -> None:
    """When the latest itself finds no room, earlier ones are left alone."""
    subject = scheduler()
    submit(subject, A, 1)
    submit(subject, B, 10)
    plan = admitted(subject)
    while not plan.preempted:
        apply(subject, plan)
        for request in plan.room:
            if request.key == A:
                assert subject.granted(request, [(request.first, request.end)])
            else:
                subject.refused(request, 0.0)
        plan = subject.plan(0.0)
    assert plan.preempted == (B,)
    assert spans(plan.rows)[0][0] == "a"


def test_a_higher_priority_takes_the_room_of_a_lower_one() -> None:
    """A waiting sequence preempts strictly lower priorities, never its equals."""
    subject = scheduler()
    submit(subject, A, 4, priority=1)
    admitted(subject)
    for key, priority, victims in ((B, 1, ()), (C, 0, (A,))):
        submit(subject, key, 8, priority=priority)
        (request,) = subject.plan(0.0).room
        subject.refused(request, 0.0)
        assert subject.plan(0.0).preempted == victims
        subject.finish(key)


def test_alone_and_refused_for_long_is_exhausted() -> None:
    """With nobody to give way, patience decides: frees take time, a pool too small stays too small."""
    subject = scheduler()
    submit(subject, A, 8)
    now_s, plan = 0.0, subject.plan(0.0)
    while not plan.exhausted:
        for request in plan.room:
            subject.refused(request, now_s)
        assert subject.due_s() > now_s
        now_s = subject.due_s() if not plan.room else now_s
        plan = subject.plan(now_s)
    assert plan.exhausted == (A,)
    assert 1.0 <= now_s <= 1.2
    assert (subject.waiting, subject.due_s()) == (0, math.inf)


def test_room_of_a_held_sequence_is_waited_for() -> None:
    """An orphan keeps what it has; others neither take it nor give up because of it."""
    subject = scheduler()
    submit(subject, A, 4)
    admitted(subject)
    subject.hold(A)
    submit(subject, B, 8)
    for tick in range(30):
        plan = subject.plan(tick * 0.1)
        assert (plan.exhausted, plan.preempted, plan.rows) == ((), (), ())
        for request in plan.room:
            subject.refused(request, tick * 0.1)
    subject.resume(A)
    assert spans(subject.plan(9.0).rows) == [("a", 0, 4)]


def test_a_hole_is_recomputed_and_survivors_are_jumped_over() -> None:
    """After a loss the counter runs over the hole only, and nothing is sampled before the end."""
    subject = scheduler()
    submit(subject, A, 30, room=[(0, 10), (10, 20), (20, 40)], computed=[(0, 29)])
    assert spans(subject.plan(0.0).rows) == [("a", 29, 1)]
    subject.lost(A, [(10, 20)])
    plan = subject.plan(0.0)
    assert plan.rows == ()
    (request,) = plan.room
    assert (request.first, request.end) == (10, 20)
    grant(subject, plan)
    refill = subject.plan(0.0)
    assert [(row.start, row.count, row.samples) for row in refill.rows] == [(10, 10, False)]
    apply(subject, refill)
    assert [(row.start, row.samples) for row in subject.plan(0.0).rows] == [(29, True)]


def test_a_chunk_under_way_during_a_loss_counts_for_nothing() -> None:
    """A step planned before a loss must not move the counter of the sequence that lost KV."""
    subject = scheduler()
    submit(subject, A, 8)
    submit(subject, B, 8)
    plan = admitted(subject)
    subject.lost(A, [(0, 12)])
    apply(subject, plan)
    assert spans(subject.plan(0.0).rows) == [("b", 8, 1)]


def test_adoption_runs_the_last_known_token_only() -> None:
    """KV up to the end is there: one row gives the logits, even if the last token was committed too."""
    for committed in (29, 30):
        subject = scheduler()
        submit(subject, A, 30, room=[(0, 40)], computed=[(0, committed)])
        (row,) = subject.plan(0.0).rows
        assert (row.start, row.count, row.samples) == (29, 1, True)


def test_an_aborted_step_is_planned_again() -> None:
    """A plan that is never applied is replaced by an equal one, and cannot be applied afterwards."""
    subject = scheduler()
    submit(subject, A, 4)
    first = admitted(subject)
    second = subject.plan(0.0)
    assert second.rows == first.rows
    apply(subject, first)
    assert subject.plan(0.0).rows == first.rows


def test_a_row_whose_sampling_failed_is_planned_again() -> None:
    """Without a token there is nothing new to run, so the counter stays."""
    subject = scheduler()
    submit(subject, A, 4)
    plan = admitted(subject)
    subject.apply(plan, {})
    assert subject.plan(0.0).rows == plan.rows


def test_answers_to_an_earlier_life_are_declined() -> None:
    """Room granted after the sequence ended, or began anew under its key, is not taken."""
    subject = scheduler()
    submit(subject, A, 4)
    (late,) = subject.plan(0.0).room
    subject.finish(A)
    assert not subject.granted(late, [(0, 8)])
    submit(subject, A, 4)
    (current,) = subject.plan(0.0).room
    assert not subject.granted(late, [(0, 8)])
    assert subject.granted(current, [(0, 8)])


def test_deadlines_end_waiting_and_running_sequences_once() -> None:
    """Both are listed in the first plan after their deadline, and are gone."""
    subject = scheduler(max_batch=1)
    submit(subject, A, 4, deadline_s=1.0)
    submit(subject, B, 4, deadline_s=1.0)
    apply(subject, admitted(subject))
    assert subject.due_s() == 1.0
    assert subject.plan(0.9).expired == ()
    assert set(subject.plan(1.0).expired) == {A, B}
    assert subject.plan(1.1).expired == ()
    assert (subject.running, subject.waiting) == (0, 0)


def test_the_queue_is_bounded() -> None:
    """max_waiting refuses by name; duplicates and late arrivals are refused too; preemption is not."""
    subject = scheduler(max_waiting=1)
    submit(subject, A, 4)
    with pytest.raises(AlreadyExists):
        submit(subject, A, 4)
    with pytest.raises(DeadlineExceeded):
        submit(subject, B, 4, deadline_s=0.0)
    with pytest.raises(ResourceExhausted, match="max_waiting"):
        submit(subject, B, 4)


@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(0, 2)), min_size=1, max_size=8),
    st.integers(1, 4),
)
def test_equals_begin_in_order(prompts: list[tuple[int, int]], max_batch: int) -> None:
    """With room for all, prompts of one priority start in order of arrival."""
    subject = scheduler(max_batch=max_batch)
    keys = [SequenceKey(f"{index:02}") for index in range(len(prompts))]
    for key, (length, priority) in zip(keys, prompts, strict=True):
        submit(subject, key, length, priority=priority, more=1)
    started: list[SequenceKey] = []
    while subject.running + subject.waiting:
        plan = subject.plan(0.0)
        grant(subject, plan)
        started += [row.key for row in plan.rows if row.start == 0]
        for row in plan.rows:
            if row.samples:
                subject.finish(row.key)
        apply(subject, plan)
    for priority in range(3):
        same = [key for key, prompt in zip(keys, prompts, strict=True) if prompt[1] == priority]
        assert [key for key in started if key in same] == same
