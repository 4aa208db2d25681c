"""How the scheduler asks for room, and who gives way when there is none."""

from __future__ import annotations

import math

from cluster.policies.scheduler import RoomRequest, Scheduler
from cluster.types import SequenceKey
from tests.scheduling import A, B, C, admitted, apply, grant, scheduler, spans, submit


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


def test_a_hole_is_asked_for_up_to_the_room_behind_it() -> None:
    """Room reserved ahead outlives a loss before it: what is asked for ends there, however far ahead of the
    known tokens that is, since no position is reserved twice.
    """
    subject = scheduler()
    subject.submit(A, 10, 0, 1e9, 0.0, max_length=100, room=[(0, 8), (8, 16), (16, 20)], computed=[(0, 9)])
    apply(subject, subject.plan(0.0))
    assert not subject.lost(A, [(8, 16)])
    requests = subject.plan(0.0).room
    assert [(request.first, request.end) for request in requests] == [(8, 16)]


def test_room_beyond_the_longest_output_is_never_asked_for() -> None:
    """`max_length` caps what is reserved ahead."""
    subject = scheduler()
    submit(subject, A, 10, more=2)
    (request,) = subject.plan(0.0).room
    assert request.end == 12


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
    assert plan.rows == (), "not while there was room left"
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
    subject.finish(A)
    (wanted,) = subject.plan(9.0).room
    assert wanted.key == B


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


def pressed(*keys: SequenceKey) -> Scheduler:
    """These run, from one-token prompts on; the first stands at the end of its room, refused at time 0."""
    subject = scheduler()
    for key in keys:
        submit(subject, key, 1)
    plan = admitted(subject)
    for _ in range(4):
        apply(subject, plan)
        for request in plan.room:
            if request.key == keys[0]:
                subject.refused(request, 0.0)
            else:
                assert subject.granted(request, [(request.first, request.end)])
        plan = subject.plan(0.0)
    apply(subject, plan)
    return subject


def test_who_was_preempted_returns_before_who_came_later() -> None:
    """A victim keeps its arrival: it is first among the waiting of its priority."""
    subject = pressed(A, B)
    submit(subject, C, 4)
    plan = subject.plan(0.0)
    assert plan.preempted == (B,)
    assert [request.key for request in plan.room] == [A], "and neither asks before the winner has room"
    grant(subject, plan)
    assert [request.key for request in subject.plan(0.0).room] == [B, C]


def test_later_ones_do_not_take_what_the_starving_one_needs() -> None:
    """While a running sequence stands without room, running ones behind it ask for none."""
    subject = pressed(A, B, C)
    plan = subject.plan(0.0)
    assert (plan.preempted, [request.key for request in plan.room]) == ((C,), [A])
    for _ in range(4):
        assert spans(plan.rows)[0][0] == "b"
        apply(subject, plan)
        plan = subject.plan(0.0)
        assert plan.room == ()


def test_one_victim_a_pause() -> None:
    """A refusal right after a preemption proves nothing: blocks are still being freed."""
    subject = pressed(A, B, C)
    for now_s, victims in ((0.0, (C,)), (0.05, ()), (0.1, (B,))):
        plan = subject.plan(now_s)
        assert plan.preempted == victims
        for request in plan.room:
            subject.refused(request, now_s)


def test_a_lonely_runner_gives_way_to_who_came_first() -> None:
    """An earlier sequence that was refused admission gets the room of a later one that cannot go on."""
    subject = scheduler()
    submit(subject, A, 50)
    (large,) = subject.plan(0.0).room
    submit(subject, B, 1)
    apply(subject, admitted(subject))
    subject.refused(large, 0.0)
    preempted: tuple[SequenceKey, ...] = ()
    while not preempted:
        plan = subject.plan(0.0)
        preempted = plan.preempted
        for request in plan.room:
            subject.refused(request, 0.0)
        apply(subject, plan)
    assert preempted == (B,)
    assert [request.key for request in subject.plan(0.1).room] == [A]


def test_waiting_for_an_earlier_one_does_not_stop_relief() -> None:
    """While an earlier sequence's attempt at admission is under way, a starving one is still helped."""
    subject = scheduler(max_batch=3)
    submit(subject, C, 50)
    (large,) = subject.plan(0.0).room
    submit(subject, A, 1)
    submit(subject, B, 1)
    plan = admitted(subject)
    subject.refused(large, -1.0)
    plan = subject.plan(0.0)
    assert [request.key for request in plan.room] == [C], "and it is never answered"
    while not plan.preempted:
        apply(subject, plan)
        plan = subject.plan(0.0)
        for request in plan.room:
            subject.refused(request, -1.0)
    assert plan.preempted == (B,)


def test_patience_begins_anew() -> None:
    """A grant, or somebody else's room, ends the time a sequence counts as alone and refused."""
    subject = scheduler()
    submit(subject, A, 8)

    def is_given_up(now_s: float) -> bool:
        plan = subject.plan(now_s)
        for request in plan.room:
            subject.refused(request, now_s)
        return A in plan.exhausted

    assert not any(is_given_up(now_s) for now_s in (0.0, 0.2, 1.0))
    (request,) = subject.plan(1.1).room
    assert subject.granted(request, [(0, 4)])
    assert not any(is_given_up(now_s) for now_s in (1.3, 1.5, 2.4)), "the grant began it anew"
    submit(subject, B, 8, room=[(0, 4)])
    subject.hold(B)
    assert not any(is_given_up(now_s) for now_s in (2.6, 3.6))
    subject.finish(B)
    assert not any(is_given_up(now_s) for now_s in (3.7, 4.6)), "somebody else had room"
    assert is_given_up(4.7)


def test_a_shard_that_grows_does_not_bring_back_what_expired() -> None:
    """A worker that has not heard of a trim yet answers with the whole range of its shard."""
    subject = scheduler(window_tokens=8)
    submit(subject, A, 20)
    grant(subject, subject.plan(0.0))
    apply(subject, subject.plan(0.0))
    assert (subject.needed_from(A), subject.expired_before(A)) == (9, 0)
    apply(subject, subject.plan(0.0))
    (wanted,) = subject.plan(0.0).room
    subject.expire_before(A, 12)
    assert subject.granted(wanted, [(0, wanted.end)])
    assert subject.lost(A, [(16, wanted.end)]) is True, "position 16 sees 9 to 15"
    assert spans(admitted(subject).rows) == [("a", 0, 16)]


def test_the_first_in_rank_waits_rather_than_giving_way() -> None:
    """When only a held sequence has room besides, giving its own up would help nobody."""
    subject = pressed(A)
    submit(subject, B, 4, priority=-1, room=[(0, 2)])
    subject.hold(B)
    for now_s in (0.0, 0.1, 5.0):
        plan = subject.plan(now_s)
        assert (plan.preempted, plan.exhausted) == ((), ())
        for request in plan.room:
            subject.refused(request, now_s)


def test_only_the_first_in_rank_is_exhausted() -> None:
    """While an earlier sequence's attempt is under way, one behind it is not given up."""
    subject = scheduler()
    submit(subject, A, 8)
    submit(subject, B, 8)
    for request in subject.plan(0.0).room:
        subject.refused(request, 0.0)
    assert [request.key for request in subject.plan(0.1).room] == [A], "and it is never answered"
    assert subject.plan(0.2).exhausted == subject.plan(9.0).exhausted == ()
