"""Wishes become plans, and what is changed on the way is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cluster.errors import InvalidRequest
from loadgen.plan import Plan, Stage
from loadgen.scenario import ArrivalKind, Scenario, plan
from loadgen.workload import Session

CONTEXT = 2048
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"


def _only(made: Plan) -> Stage:
    (stage,) = made.stages
    return stage


def _moments(made: Plan) -> list[float]:
    return [session.at_s for session in _only(made).sessions if session.at_s is not None]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Four requests, a second apart."""
    file = tmp_path / "trace.csv"
    rows = (f"2023-11-16 18:15:4{second},{100 * (second + 1)},{second + 1}" for second in range(4))
    file.write_text("\n".join([AZURE, *rows]))
    return file


def test_the_same_seed_gives_the_same_plan() -> None:
    """Moments, lengths, contents and pauses; another seed gives others."""
    wish = Scenario(seed=3, rate=5.0, duration_s=20.0, prompt="lognormal:100:1", turns=2, think_s=1.0)
    assert plan(wish, CONTEXT) == plan(wish, CONTEXT)
    assert plan(wish, CONTEXT) != plan(dataclasses.replace(wish, seed=4), CONTEXT)


def test_an_open_loop_ends_after_its_time_or_its_requests() -> None:
    """Whichever comes first; requests count all turns of a session."""
    by_time = plan(Scenario(rate=10.0, duration_s=5.0), CONTEXT)
    assert max(_moments(by_time)) < 5.0
    by_count = plan(Scenario(rate=10.0, requests=30, turns=3), CONTEXT)
    assert (len(_only(by_count).sessions), _only(by_count).requests) == (10, 30)


def test_a_ladder_has_a_stage_for_each_number_with_sessions_of_its_own() -> None:
    """No session is asked twice: what one stage left in a cache helps no other."""
    made = plan(Scenario(concurrency=(1, 4), requests=5), CONTEXT)
    assert [stage.name for stage in made.stages] == ["concurrency 1", "concurrency 4"]
    assert [stage.requests for stage in made.stages] == [5, 5]
    every = [session.turns[0].segments for stage in made.stages for session in stage.sessions]
    assert len(set(every)) == 10


def test_a_trace_is_replayed_with_its_own_pairs(trace: Path) -> None:
    """Each moment keeps its lengths; a rate speeds all of it up and says so; a beginning is passed over."""
    whole = plan(Scenario(trace_file=trace), CONTEXT)
    assert _moments(whole) == [0.0, 1.0, 2.0, 3.0]
    assert [session.turns[0].new_tokens for session in _only(whole).sessions] == [100, 200, 300, 400]
    fast = plan(Scenario(trace_file=trace, arrivals=ArrivalKind.TRACE, rate=4.0), CONTEXT)
    assert _moments(fast) == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert any("replayed at 4 x" in note for note in fast.notes)
    late = plan(Scenario(trace_file=trace, trace_from_s=2.0), CONTEXT)
    assert [session.turns[0].output_tokens for session in _only(late).sessions] == [3, 4]


def test_a_rate_makes_a_trace_a_list_of_lengths(trace: Path) -> None:
    """Poisson arrivals, its lengths in their order, from the beginning again where it is too short, aloud."""
    made = plan(Scenario(trace_file=trace, rate=10.0, requests=6), CONTEXT)
    assert [session.turns[0].output_tokens for session in _only(made).sessions] == [1, 2, 3, 4, 1, 2]
    assert any("its 4 requests are repeated to make 6" in note for note in made.notes)
    assert f"trace {trace} (4 requests)" in made.notes


def test_a_rate_that_takes_arrivals_away_says_so(trace: Path) -> None:
    """Of a fit with its variation, of a trace; not where an arrival process was asked for, or none lost."""
    fitted = plan(Scenario(workload="azure-code", rate=2.0, requests=50), CONTEXT)
    assert (
        "arrivals are Poisson at 2 per second, not of cv 13.2, as fitted (--arrivals gamma)" in fitted.notes
    )
    recorded = plan(Scenario(trace_file=trace, rate=2.0, requests=4), CONTEXT)
    assert "arrivals are Poisson at 2 per second, not as recorded (--arrivals trace)" in recorded.notes
    for wish in (
        Scenario(rate=2.0, requests=4),
        Scenario(workload="azure-code", rate=2.0, requests=4, arrivals=ArrivalKind.POISSON),
        Scenario(workload="azure-code", rate=2.0, requests=4, arrivals=ArrivalKind.GAMMA),
        Scenario(trace_file=trace),
    ):
        assert not any("Poisson" in note for note in plan(wish, CONTEXT).notes)


def test_a_named_workload_says_that_it_is_a_fit_and_what_was_clipped() -> None:
    """Without a rate arrivals are as fitted, too; clipping and scaling are in the notes."""
    made = plan(Scenario(workload="azure-conv", duration_s=60.0), 512)
    assert any("fitted to the 19,366 requests" in note for note in made.notes)
    assert any("arrivals as fitted: 5.53" in note for note in made.notes)
    assert any("clipped to the context of 512 tokens" in note for note in made.notes)
    assert 200 < _only(made).requests < 460
    for session in _only(made).sessions:
        assert session.turns[0].new_tokens + session.turns[0].output_tokens <= 512
    quarter = plan(Scenario(workload="azure-conv", rate=2.0, requests=50, length_scale=0.25), 100_000)
    assert any("all lengths times 0.25" in note for note in quarter.notes)


@pytest.mark.parametrize("stage", [
    Stage("run", tuple(Session(index, (), 0.0) for index in range(11)), 0.0),
    Stage("concurrency 5", tuple(Session(index, ()) for index in range(11)), 0.0, concurrency=5),
])  # fmt: skip
@pytest.mark.parametrize("senders", [1, 2, 3, 8])
def test_senders_share_a_stage_without_loss(stage: Stage, senders: int) -> None:
    """Every session has one sender, every user too; no sender without users has sessions."""
    parts = [stage.part(number, senders) for number in range(senders)]
    assert sorted(session.index for part in parts for session in part.sessions) == list(range(11))
    if stage.concurrency is not None:
        assert sum(part.concurrency or 0 for part in parts) == 5
        assert all(part.concurrency or not part.sessions for part in parts)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (Scenario(), "--rate"),
        (Scenario(rate=1.0, concurrency=(1,)), "closed loop"),
        (Scenario(concurrency=(0,)), "above 0"),
        (Scenario(rate=0.0, workload="azure-conv"), "must be above 0"),
        (Scenario(rate=1.0, cv=2.0), "--arrivals gamma"),
        (Scenario(rate=1.0, arrivals=ArrivalKind.GAMMA), "needs --cv"),
        (Scenario(rate=1.0, arrivals=ArrivalKind.RAMP), "--rate-end"),
        (Scenario(rate=1.0, rate_end=2.0), "ramp"),
        (Scenario(arrivals=ArrivalKind.TRACE), "--trace-file"),
        (Scenario(rate=1.0, duration_s=5.0, warm_up_s=5.0), "--warm-up"),
        (Scenario(rate=1.0, workload="azure-conv", trace_file=Path("x")), "either"),
        (Scenario(rate=1e-6, duration_s=0.1), "no request arrives"),
        (Scenario(rate=1.0, workload="azure"), "no workload"),
        (Scenario(rate=1.0, length_scale=0.0), "scaled"),
    ],
)  # fmt: skip
def test_wishes_that_are_none_are_refused(wish: Scenario, words: str) -> None:
    """With what to do instead."""
    with pytest.raises(InvalidRequest, match=words):
        plan(wish, CONTEXT)
