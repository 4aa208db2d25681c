"""What senders report is what happened: counts exactly, times within bounds that are stated."""

from __future__ import annotations

import os
import signal
from collections import Counter
from itertools import pairwise
from time import sleep

import numpy as np
import pytest

from loadgen.arrivals import Limit, poisson
from loadgen.metrics import Facts, summarize
from loadgen.plan import Plan, Stage
from loadgen.pool import SENDER_LOST
from loadgen.prompts import PromptKind
from loadgen.records import Outcome
from loadgen.workload import Row, sessions
from tests.loadgen.paced import CONTEXT, PROMPT_TOKENS_CACHED, GrpcServer, OpenAiServer, Script
from tests.loadgen.watching import Run, closed

SERVERS = pytest.mark.parametrize("server_of", [GrpcServer, OpenAiServer])
LATE_S = 0.05
"""What a busy machine may add to a moment of a run; none may be early."""
LATE_SHARE = 0.2
"""The same of the time between two moments, as a share."""


def _open(rate: float, duration_s: float, row: Row, warm_up_s: float = 0.0) -> Plan:
    times_s = poisson(rate).times_s(np.random.default_rng(1), Limit(duration_s=duration_s))
    found, _ = sessions([row] * len(times_s), times_s, turns=1, think_s=0.0, context=CONTEXT, seed=1)
    return Plan((Stage("run", tuple(found), warm_up_s, request_rate=rate),), (), {})


@SERVERS
def test_a_known_pace_is_reported(server_of: type[GrpcServer | OpenAiServer]) -> None:
    """Counts of requests, tokens and deltas are exact. Requests leave when they are due, and TTFT, TPOT, ITL
    and end-to-end latency are the server's: never less, and their medians at most `LATE_S` more, those of
    gaps at most `LATE_SHARE`.
    """
    script = Script(first_s=0.1, gap_s=0.1)
    plan = _open(rate=40.0, duration_s=1.2, row=Row(16, 6))
    with server_of(script) as server:
        run = Run().do(plan, server.target, senders=2)
    count = plan.stages[0].requests
    assert len(run.records) == len(script.prompts) == count
    assert {record.outcome for record in run.records} == {Outcome.COMPLETED}
    assert {len(record.deltas_s) for record in run.records} == {6}
    assert {record.output_tokens for record in run.records} == {6}
    assert {record.prompt_tokens for record in run.records} == {16}
    assert {record.cached_tokens for record in run.records} == {PROMPT_TOKENS_CACHED}
    summary = summarize(run.records, Facts("run", run.courses[0].begins_s, count, 0.0, request_rate=40.0))
    assert (summary["completed"], summary["failed"], summary["unsent"]) == (count, 0, 0)
    assert summary["total_output_tokens"] == 6 * count
    for name, paced_ms in (("ttft", 100), ("e2el", 600), ("send_lag", 0)):
        assert paced_ms - 1 <= summary[f"median_{name}_ms"] <= paced_ms + 1000 * LATE_S, name
    for name in ("tpot", "itl"):
        assert 99 <= summary[f"median_{name}_ms"] <= 100 * (1 + LATE_SHARE), name
    due = sorted(run.courses[0].begins_s + (session.at_s or 0.0) for session in plan.stages[0].sessions)
    assert sorted(record.intended_s for record in run.records) == pytest.approx(due, abs=1e-9)
    assert min(record.lag_s or 0.0 for record in run.records) >= 0
    assert summary["achieved_over_asked"] == pytest.approx(1, abs=0.05)


def test_our_api_tells_times_by_role() -> None:
    """The server's own account is in each record, and its mean in the summary."""
    with GrpcServer(Script(first_s=0.0, gap_s=0.0)) as server:
        run = Run().do(closed([Row(4, 2)] * 4, concurrency=2), server.target)
    assert {record.timings.dense_seconds for record in run.records if record.timings} == {0.25}
    summary = summarize(run.records, Facts("run", 0.0, 4, 0.0, concurrency=2))
    assert summary["mean_attention_ms"] == pytest.approx(500)


@SERVERS
def test_refusals_are_counted_exactly(server_of: type[GrpcServer | OpenAiServer]) -> None:
    """Every third request is refused: as many failures, with their reason, and no token from them."""
    script = Script(first_s=0.0, gap_s=0.0, refuses=lambda number: number % 3 == 0)
    with server_of(script) as server:
        run = Run().do(closed([Row(4, 2)] * 20, concurrency=4), server.target)
    outcomes = Counter(record.outcome for record in run.records)
    assert outcomes == {Outcome.COMPLETED: 13, Outcome.FAILED: 7}
    failed = [record for record in run.records if record.outcome is Outcome.FAILED]
    assert {record.error.partition(":")[0] for record in failed} == {"RESOURCE_EXHAUSTED"}
    assert sum(len(record.deltas_s) for record in failed) == 0


@SERVERS
def test_a_server_killed_in_the_middle(server_of: type[GrpcServer | OpenAiServer]) -> None:
    """It ends when eight of twenty requests are answered and the next four have one token: eight completed,
    twelve failed, of which four keep the token that they saw.
    """
    script = Script(first_s=0.02, gap_s=0.01, holds_from=8)
    with server_of(script) as server:

        def kill(run: Run) -> None:
            if len(run.records) == 8:
                assert all(script.held.acquire(timeout=10.0) for _ in range(4))
                sleep(10 * LATE_S)  # what was sent to the senders, they have read
                server.kill()

        run = Run(kill).do(closed([Row(4, 3)] * 20, concurrency=4), server.target)
    outcomes = Counter(record.outcome for record in run.records)
    assert outcomes == {Outcome.COMPLETED: 8, Outcome.FAILED: 12}
    failed = [record for record in run.records if record.outcome is Outcome.FAILED]
    assert {record.error.partition(":")[0] for record in failed} == {"UNAVAILABLE"}
    assert Counter(len(record.deltas_s) for record in failed) == {1: 4, 0: 8}


def test_a_sender_killed_in_the_middle() -> None:
    """One of two sender processes dies: each request of the plan has one record all the same, and those it
    had not reported failed by that reason.
    """

    def kill(run: Run) -> None:
        if len(run.records) == 1:
            os.kill(run.process_ids[0], signal.SIGKILL)

    with GrpcServer(Script(first_s=0.3, gap_s=0.0)) as server:
        run = Run(kill).do(closed([Row(4, 2)] * 24, concurrency=4), server.target, senders=2)
    assert len({(record.session, record.turn) for record in run.records}) == len(run.records) == 24
    lost = [record for record in run.records if record.error.startswith(SENDER_LOST)]
    assert len(lost) + sum(record.outcome is Outcome.COMPLETED for record in run.records) == 24
    assert 0 < len(lost) <= 12
    summary = summarize(run.records, Facts("run", 0.0, 24, 0.0, concurrency=4))
    assert summary["errors"] == {SENDER_LOST: len(lost)}
    assert summary["unsent"] == 0


def test_a_stopped_run_reports_what_there_is() -> None:
    """Requests under way are interrupted, those not yet due are not sent, and neither counts as failed."""
    with GrpcServer(Script(first_s=0.05, gap_s=0.0, holds_from=6)) as server:
        run = Run(lambda run: run.stop.set() if len(run.records) == 6 else None)
        run.do(closed([Row(4, 2)] * 40, concurrency=4), server.target)
    outcomes = Counter(record.outcome for record in run.records)
    assert outcomes == {Outcome.COMPLETED: 6, Outcome.INTERRUPTED: 4}


@pytest.mark.parametrize("kind", PromptKind)
def test_a_session_goes_on_from_its_answers(kind: PromptKind) -> None:
    """The prompt of each turn is the one before, the answer to it, and what is new; it is sent after the
    answer and the pause.
    """
    script = Script(first_s=0.02, gap_s=0.01)
    with GrpcServer(script) as server:
        run = Run().do(closed([Row(5, 3)] * 3, 1, turns=3, think_s=0.05), server.target, kind=kind)
    first, second, third = script.prompts
    answer = " t0 t1 t2" if kind is PromptKind.TEXT else [0, 1, 2]
    assert second[: len(first) + len(answer)] == first + answer
    assert third[: len(second) + len(answer)] == second + answer
    records = sorted(run.records, key=lambda record: record.turn)
    assert [record.asked_prompt_tokens for record in records] == [5, 13, 21]
    assert [record.prompt_tokens for record in records] == [5, 13, 21]
    for before, after in pairwise(records):
        assert after.intended_s > before.ended_s
        assert (after.sent_s or 0.0) >= after.intended_s


def test_stages_follow_each_other() -> None:
    """A ladder: no stage begins before the last one's requests are over, and each has its number of users."""
    found, _ = sessions([Row(4, 2)] * 18, None, turns=1, think_s=0.0, context=CONTEXT, seed=1)
    stages = tuple(
        Stage(f"concurrency {users}", tuple(found[6 * place : 6 * place + 6]), 0.0, concurrency=users)
        for place, users in enumerate((1, 3, 6))
    )
    with GrpcServer(Script(first_s=0.05, gap_s=0.0)) as server:
        run = Run().do(Plan(stages, (), {}), server.target, senders=2)
    over_s = 0.0
    for course in run.courses:
        records = [record for record in run.records if record.stage == course.stage.name]
        assert len(records) == 6
        assert min(record.sent_s or 0.0 for record in records) >= course.begins_s >= over_s
        over_s = max(record.ended_s for record in records)
        summary = summarize(run.records, Facts(course.stage.name, course.begins_s, 6, 0.0, concurrency=6))
        assert summary["max_concurrent_requests"] == course.stage.concurrency


def test_the_warm_up_does_not_count() -> None:
    """Requests due in the first half second are sent and recorded, and are in no figure."""
    plan = _open(rate=40.0, duration_s=1.0, row=Row(4, 2), warm_up_s=0.5)
    with GrpcServer(Script(first_s=0.01, gap_s=0.0)) as server:
        run = Run().do(plan, server.target)
    early = sum((session.at_s or 0.0) < 0.5 for session in plan.stages[0].sessions)
    count = plan.stages[0].requests
    assert 0 < early < count
    assert sum(record.warm_up for record in run.records) == early
    facts = Facts("run", run.courses[0].begins_s + 0.5, count, 0.0, request_rate=40.0)
    assert summarize(run.records, facts)["completed"] == count - early
