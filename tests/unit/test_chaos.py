"""The pure parts of `anabranch chaos`: what a seed means, and what a course says."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from anabranch.cli.chaos import schedule
from anabranch.cli.chaos.load import Answer, deadline_s
from anabranch.cli.chaos.lost_capacity import Lost
from anabranch.cli.chaos.run import Course, Settings
from anabranch.cli.chaos.schedule import Fault, Kind, Loss, Request, Role
from anabranch.cli.chaos.strike import Struck
from anabranch.cli.chaos.verdict import percentile, summary, verdict

TIE = 1e-3


def _request(number: int, tokens: int = 4) -> Request:
    return Request(f"chaos-0-{number}", float(number), (1, 2, 3), tokens, {"temperature": 0.0, "seed": 0})


def _answer(request: Request, arrivals_s: Sequence[float], tokens: Sequence[int] = (7, 8, 9, 10)) -> Answer:
    answer = Answer(request, sent_s=arrivals_s[0] - 0.1, ended_s=arrivals_s[-1])
    answer.tokens, answer.arrivals_s = list(tokens), list(arrivals_s)
    answer.resumes = [0] * len(arrivals_s)
    return answer


def _course(calm: Answer, disturbed: Answer, *struck: Struck) -> Course:
    """With a fault that nobody noticed unless others are named."""
    faults = list(struck) or [_struck("gateway", "kill", 0.0)]
    return Course(Settings(0), calm=[calm], disturbed=[disturbed], struck=faults)


def _struck(role: Role, kind: Kind, at_s: float) -> Struck:
    return Struck(Fault(role, kind, None, 0, None), f"{role}-0", at_s, 1, False, True, 1.0)


def _lost(answers: Sequence[Answer], again: Sequence[Answer] = ()) -> Lost:
    """All dense workers were killed at 12; the first successor served at 14.5, the second at 15."""
    return Lost(Loss("dense", 0, 2.0), 12.0, 14.5, 15.0, list(answers), list(again))


def _failed(request: Request, arrivals_s: Sequence[float], error: str) -> Answer:
    answer = _answer(request, arrivals_s, (7, 8, 9, 10)[: len(arrivals_s)])
    answer.error = error
    return answer


def _never(_request: Request, _tokens: Sequence[int]) -> float:
    raise AssertionError("nothing differs")


def test_a_seed_always_means_the_same() -> None:
    """Requests and faults are functions of the seed, and differ between seeds."""
    assert schedule.requests(3, 50) == schedule.requests(3, 50)
    assert schedule.requests(3, 50) != schedule.requests(4, 50)
    first, second = (list(itertools.islice(schedule.faults(3), 40)) for _ in range(2))
    assert first == second


def test_rounds_hold_every_role_and_kind_and_half_at_points() -> None:
    """Two rounds strike each role in each way twice, once of them at a named point; where lanes are sockets
    of this machine only a gateway can be cut off.
    """
    for seed, pairs in ((1, 9), (2, 7)):
        drawn = list(itertools.islice(schedule.faults(seed), 2 * pairs))
        assert set(Counter((fault.role, fault.kind) for fault in drawn).values()) == {2}
        assert sum(fault.point is not None for fault in drawn) == pairs


def test_a_pace_makes_the_load_that_is_asked_for() -> None:
    """Requests are spread so that their outputs make so many tokens per second until the last one is sent."""
    asked = schedule.requests(5, 100)
    paced = schedule.paced(asked, tokens_per_second=50.0)
    assert sum(request.max_tokens for request in paced) / paced[-1].at_s == pytest.approx(50.0)
    assert [request.prompt for request in paced] == [request.prompt for request in asked]


def test_a_calm_course_has_no_failures() -> None:
    """Same tokens, no error: nothing to say."""
    request = _request(0)
    course = _course(_answer(request, [1, 2, 3, 4]), _answer(request, [11, 12, 13, 14]))
    assert verdict(course, _never, TIE)["failures"] == []


def test_a_course_that_proves_nothing_fails() -> None:
    """Without a fault that met an open stream nothing was tried."""
    request = _request(0)
    course = _course(_answer(request, [1, 2, 3, 4]), _answer(request, [11, 12, 13, 14]))
    course.struck.clear()
    (unstruck,) = verdict(course, _never, TIE)["failures"]
    assert "no fault struck" in unstruck


@pytest.mark.parametrize(
    ("gap", "failures", "ties"), [(1e-4, 1, 1), (0.5, 1, 0)], ids=["near-tie", "another token"]
)
def test_a_difference_is_a_failure_unless_rounding_may_decide(gap: float, failures: int, ties: int) -> None:
    """The gap at the first differing token decides; near-ties are listed, and too many of them (one in one
    request here) fail as well.
    """
    request = _request(0)
    course = _course(_answer(request, [1, 2, 3, 4]), _answer(request, [1, 2, 3, 4], [7, 8, 5, 5]))
    asked: list[Sequence[int]] = []

    def gap_at(_request: Request, tokens: Sequence[int]) -> float:
        asked.append(tokens)
        return gap

    report = verdict(course, gap_at, TIE)
    assert asked == [[7, 8]]
    assert (len(report["failures"]), len(report["near_ties"])) == (failures, ties)


def test_errors_and_missing_tokens_are_failures() -> None:
    """In either run, and by the request's name."""
    request = _request(0)
    broken = _answer(request, [1, 2, 3, 4])
    broken.error = "UNAVAILABLE: nobody is there"
    short = _answer(request, [1, 2, 3], [7, 8, 9])
    report = verdict(_course(short, broken), _never, TIE)
    assert len(report["failures"]) == 2
    assert all("chaos-0-0" in failure for failure in report["failures"])


def test_what_was_given_up_says_why_and_nothing_else() -> None:
    """A fleet that did not recover is the failure; requests that had not ended by then are none."""
    requests = [_request(number) for number in range(2)]
    calm = [_answer(request, [1, 2, 3, 4]) for request in requests]
    struck = _struck("dense", "kill", 12.5)
    course = Course(Settings(0), calm, [_answer(requests[1], [11, 12, 15, 16])], [struck])
    course.problems.append("the machine is busy")
    report = verdict(course, _never, TIE)
    assert report["failures"] == ["the machine is busy"]
    assert report["faults"][0]["extra_s"] == [pytest.approx(2.0)]


def test_the_extra_silence_is_that_around_the_fault_beyond_the_own_calm_one() -> None:
    """A request's longest calm gap is subtracted from the gap in which the fault struck."""
    request = _request(0)
    calm = _answer(request, [1, 2, 3.5, 4])
    disturbed = _answer(request, [11, 12, 15, 16])
    report = verdict(_course(calm, disturbed, _struck("dense", "kill", 12.5)), _never, TIE)
    assert report["faults"][0]["extra_s"] == [pytest.approx(1.5)]


def test_what_a_resubmission_found_less_than_the_prompt_was_computed_again() -> None:
    """A dense worker was lost: prompt tokens that had been computed and were not found are a failure."""
    request = _request(0)
    calm = _answer(request, [1, 2, 3, 4])
    course = _course(calm, _answer(request, [11, 12, 15, 16]), _struck("dense", "kill", 12.5))
    admitted = {"time": "1970-01-01T00:00:13Z", "event": "admitted", "request_id": "chaos-0-0-chaos"}
    course.logs = {"dense-1": [{**admitted, "tokens": 5, "found": 1}]}
    report = verdict(course, _never, TIE)
    assert report["faults"][0]["prompt_tokens_recomputed"] == 2
    assert report["failures"] == ["2 prompt tokens were computed again without an attention worker's loss"]


@pytest.mark.parametrize(("second", "recomputed"), [("11.5", 2), ("12.2", 0), ("12.8", 0)])
def test_what_an_attention_worker_had_lost_is_no_failure_of_a_take_over(second: str, recomputed: int) -> None:
    """A dense worker is struck while a sequence is silent because shards of it were lost; a loss before the
    last token that came was made good by then.
    """
    request = _request(0)
    calm = _answer(request, [1, 2, 3, 4])
    course = _course(calm, _answer(request, [11, 12, 15, 16]), _struck("dense", "kill", 12.5))
    lost = {"time": f"1970-01-01T00:00:{second}Z", "event": "shards_lost", "request_id": "chaos-0-0-chaos"}
    admitted = {**lost, "time": "1970-01-01T00:00:13Z", "event": "admitted", "tokens": 5, "found": 1}
    course.logs = {"dense-0": [{**lost, "peer": "attention-1"}], "dense-1": [admitted]}
    assert verdict(course, _never, TIE)["faults"][0]["prompt_tokens_recomputed"] == recomputed


@pytest.mark.parametrize(("moment", "recomputed"), [("15.9", 2), ("16.1", 0)])
def test_a_take_over_that_comes_when_its_client_has_everything_is_none(moment: str, recomputed: int) -> None:
    """A gateway was cut off with a resubmission on its way, while the client went on elsewhere to the end."""
    request = _request(0)
    calm = _answer(request, [1, 2, 3, 4])
    struck = replace(_struck("gateway", "cut", 12.5), whole_again_s=9.0)
    course = _course(calm, _answer(request, [11, 12, 15, 16]), struck)
    admitted = {"event": "admitted", "request_id": "chaos-0-0-chaos", "tokens": 5, "found": 1}
    course.logs = {"dense-1": [{"time": f"1970-01-01T00:00:{moment}Z", **admitted}]}
    assert verdict(course, _never, TIE)["faults"][0]["prompt_tokens_recomputed"] == recomputed


def test_a_summary_counts_and_ranks() -> None:
    """Faults per role and kind, and nearest-rank percentiles over the streams of all seeds."""
    fault: dict[str, Any] = {"role": "dense", "kind": "kill", "point": "append-apply"}
    seed: dict[str, Any] = {"requests": 2, "near_ties": [], "failures": [], "load_share": 0.2, "losses": []}
    whole = summary([{**seed, "faults": [{**fault, "extra_s": [float(i)]}]} for i in range(20)])
    assert whole["faults"] == {"dense kill": 20}
    assert whole["faults_at_points"] == {"append-apply": 20}
    assert whole["extra_s"]["dense"] == {"streams": 20, "p50": 9.0, "p95": 18.0}
    assert percentile([], 0.5) is None


def test_each_role_is_lost_once_and_attention_also_in_part() -> None:
    """In an order and for times that are the seed's."""
    assert schedule.losses(3) == schedule.losses(3)
    drawn = {schedule.losses(seed) for seed in range(20)}
    assert len({tuple(loss.name for loss in losses) for losses in drawn}) > 1
    for losses in drawn:
        names = sorted(loss.name for loss in losses)
        assert names == ["all attention", "all but 1 attention", "all dense", "all gateway"]


@pytest.mark.parametrize(
    ("arrivals_s", "error", "failures"),
    [
        ([11, 11.5], "UNAVAILABLE: nobody serves this", 0),
        ([13], "RESOURCE_EXHAUSTED: no room", 0),
        ([11, 13], "INTERNAL: a bug", 1),
        ([10, 11], "UNAVAILABLE: before anything was lost", 1),
        ([16, 17], "UNAVAILABLE: though the fleet was whole", 1),
        ([13, 21], "UNAVAILABLE: long after the fleet was whole", 1),
        ([13, 21], "DEADLINE_EXCEEDED: it waited too long", 0),
    ],
    ids=["open", "refused", "an error that is a bug", "before", "behind", "too late", "its deadline"],
)
def test_what_lost_capacity_excuses(arrivals_s: Sequence[float], error: str, failures: int) -> None:
    """Three errors, of requests that were open at some time of the loss, and nothing else."""
    request = _request(0)
    answer = _failed(request, arrivals_s, error)
    answer.ended_s = 12.5 if arrivals_s[-1] == 11.5 else arrivals_s[-1]
    course = Course(Settings(0), calm=[_answer(request, [1, 2, 3, 4])], disturbed=[answer])
    course.lost = [_lost([answer])]
    assert len(verdict(course, _never, TIE)["failures"]) == failures


def test_tokens_before_an_excused_error_are_compared() -> None:
    """A request may fail while capacity is lost; that it received another token before is a failure."""
    request = _request(0)
    wrong = _failed(request, [11, 13], "UNAVAILABLE: nobody serves this")
    wrong.tokens[1] = 5
    course = Course(Settings(0), calm=[_answer(request, [1, 2, 3, 4])], disturbed=[wrong])
    course.lost = [_lost([wrong])]
    (failure,) = verdict(course, lambda _request, _tokens: 0.5, TIE)["failures"]
    assert "token 1 differs" in failure


def test_what_is_sent_again_must_end_well() -> None:
    """When the fleet is whole there is no excuse, for nobody."""
    request = _request(0)
    refused = _failed(request, [13], "UNAVAILABLE: nobody serves this")
    again = _failed(request, [17, 18], "UNAVAILABLE: nobody serves this")
    course = Course(Settings(0), calm=[_answer(request, [1, 2, 3, 4])], disturbed=[refused])
    course.lost = [_lost([refused], [again])]
    assert len(verdict(course, _never, TIE)["failures"]) == 1


def test_a_request_that_outlives_its_deadline_is_a_failure() -> None:
    """Whatever it ends with; hasty clients' deadlines are shorter."""
    patient, hasty = _request(0), schedule.with_haste([_request(0)])[0]
    assert deadline_s(hasty) < deadline_s(patient)
    answer = _failed(hasty, [11, 13], "DEADLINE_EXCEEDED: too late")
    answer.ended_s = answer.sent_s + deadline_s(patient)
    course = Course(Settings(0), calm=[_answer(hasty, [1, 2, 3, 4])], disturbed=[answer])
    course.lost = [_lost([answer])]
    (failure,) = verdict(course, _never, TIE)["failures"]
    assert "beyond its deadline" in failure


def test_a_loss_reports_who_failed_and_who_waited() -> None:
    """Of the requests open in it: the errors, and when the next token came of those that were silent."""
    requests = [_request(number) for number in range(4)]
    calm = [_answer(request, [1, 2, 3, 4]) for request in requests]
    answers = [
        _failed(requests[0], [11, 13], "UNAVAILABLE: nobody serves this"),
        _answer(requests[1], [11, 15.5, 16, 17]),
        _answer(requests[2], [14, 14.9, 15, 16]),
        _answer(requests[3], [20, 21, 22, 23]),
    ]
    course = Course(Settings(0), calm=calm, disturbed=answers, lost=[_lost(answers)])
    seed = verdict(course, _never, TIE)
    assert seed["failures"] == []
    (loss,) = seed["losses"]
    assert (loss["requests"], loss["failed"], loss["next_token_s"]) == (3, {"UNAVAILABLE": 1}, [1.0])
    twice = summary([seed, seed])["losses"]["all dense"]
    assert twice == {
        "times": 2, "requests": 6, "failed": {"UNAVAILABLE": 2}, "waited": 2, "p50": 1.0, "p95": 1.0,
    }  # fmt: skip
