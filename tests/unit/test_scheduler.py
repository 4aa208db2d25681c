"""The scheduler's plans, claim by claim; `test_scheduler_machine` tries everything at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import AlreadyExists, DeadlineExceeded, ResourceExhausted
from cluster.types import SequenceKey
from tests.scheduling import A, B, C, D, admitted, apply, grant, scheduler, spans, submit


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


def test_priority_then_arrival_decide_who_is_admitted() -> None:
    """A lower priority number is sooner; equals are served as they came."""
    subject = scheduler(max_batch=2)
    for key, priority in ((A, 1), (B, 0), (C, 1), (D, 0)):
        submit(subject, key, 1, priority=priority)
    assert [request.key for request in subject.plan(0.0).room] == [B, D]


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
    again = subject.plan(0.0)
    assert spans(again.rows) == [("b", 8, 1)]
    assert (again.room[0].key, again.room[0].first) == (A, 0)
    grant(subject, again)
    assert spans(subject.plan(0.0).rows)[1:] == [("a", 0, 8)]


def test_a_chunk_ends_where_committed_tokens_begin() -> None:
    """Within one shard too, what survived is not written again."""
    subject = scheduler()
    submit(subject, A, 30, room=[(0, 40)], computed=[(0, 10), (15, 20)])
    plan = subject.plan(0.0)
    assert spans(plan.rows) == [("a", 10, 5)]
    apply(subject, plan)
    assert spans(subject.plan(0.0).rows) == [("a", 20, 10)]


def test_adoption_runs_the_last_known_token_only() -> None:
    """KV up to the end is there: one row gives the logits, even if the last token was committed too."""
    for committed in (29, 30):
        subject = scheduler()
        submit(subject, A, 30, room=[(0, 35), (35, 40)], computed=[(0, committed), (35, 35)])
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
    third = subject.plan(0.0)
    assert third.rows == first.rows
    submit(subject, B, 16, priority=-1, room=[(0, 20)])
    crowding = subject.plan(0.0)
    assert spans(crowding.rows) == [("b", 0, 16)]
    apply(subject, third)
    apply(subject, crowding)
    assert spans(subject.plan(0.0).rows) == [("b", 16, 1), ("a", 0, 4)]


def test_a_row_whose_sampling_failed_is_planned_again() -> None:
    """Without a token there is nothing new to run, so the counter stays."""
    subject = scheduler()
    submit(subject, A, 4)
    plan = admitted(subject)
    subject.apply(plan, {})
    assert subject.plan(0.0).rows == plan.rows


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
