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
from anabranch.cli.chaos.verdict import summary, verdict
from cluster.perfmodel import Line

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
    """The fleet was whole after a second; steps take 10 ms, and 1 ms for each token."""
    step = Line(0.01, 0.001)
    return Struck(Fault(role, kind, None, 0, None), f"{role}-0", at_s, 1, False, True, 1.0, step)


def _event(at_s: float, event: str, **fields: Any) -> dict[str, Any]:
    """Of the only request, as a process logs it; before 60 s."""
    return {
        "time": f"1970-01-01T00:00:{at_s:09.6f}Z",
        "event": event,
        "request_id": "chaos-0-0-chaos",
        **fields,
    }


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


@pytest.mark.parametrize(
    ("seed", "kinds", "pairs"),
    [(1, schedule.KINDS, 9), (2, schedule.KINDS, 7), (1, ("kill", "freeze"), 6), (2, ("kill",), 3)],
)
def test_rounds_hold_every_role_and_kind_and_every_other_fault_is_at_a_point(
    seed: int, kinds: Sequence[Kind], pairs: int
) -> None:
    """Two rounds strike each role in each way twice, once of them at a named point; where lanes are sockets
    of this machine only a gateway can be cut off. Wherever a run ends, half of its faults were at points.
    """
    drawn = list(itertools.islice(schedule.faults(seed, kinds), 4 * pairs))
    assert [fault.point is not None for fault in drawn] == [True, False] * (2 * pairs)
    for first in (0, 2 * pairs):
        two_rounds = drawn[first : first + 2 * pairs]
        struck = Counter((fault.role, fault.kind, fault.point is not None) for fault in two_rounds)
        assert len(struck) == 2 * pairs


def test_a_pace_makes_the_load_that_is_asked_for() -> None:
    """Requests are spread so that their outputs make so many tokens per second until the last one is sent,
    fewer where a least time is asked for.
    """
    asked = schedule.requests(5, 100)
    paced = schedule.paced(asked, tokens_per_second=50.0)
    assert sum(request.max_tokens for request in paced) / paced[-1].at_s == pytest.approx(50.0)
    assert [request.prompt for request in paced] == [request.prompt for request in asked]
    slower = schedule.paced(asked, tokens_per_second=50.0, seconds_least=paced[-1].at_s + 1)
    assert slower[-1].at_s == pytest.approx(paced[-1].at_s + 1)
    assert schedule.paced(asked, tokens_per_second=50.0, seconds_least=1.0) == paced


def test_a_calm_course_has_no_failures() -> None:
    """Same tokens, no error: nothing to say but how often cache was moved."""
    request = _request(0)
    course = _course(_answer(request, [1, 2, 3, 4]), _answer(request, [11, 12, 13, 14]))
    course.logs = {"dense-0": [_event(11.5, "moved"), _event(11.6, "finished")]}
    report = verdict(course, _never, TIE)
    assert (report["failures"], report["moves"]) == ([], 1)


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
    course.logs = {"gateway-0": [_event(12.6, "resubmit") | {"request_id": "chaos-0-1-chaos"}]}
    report = verdict(course, _never, TIE)
    assert report["failures"] == ["the machine is busy"]
    assert report["faults"][0]["extra_s"] == [pytest.approx(2.0)]


@pytest.mark.parametrize(
    ("sent_s", "arrivals_s", "ended_s", "waits"),
    [
        (1.0, [2.0], 0.0, True),
        (1.0, [], 0.0, True),
        (1.0, [2.0, 6.0], 0.0, False),
        (1.0, [2.0], 7.0, False),
        (6.0, [], 0.0, False),
        (0.0, [], 0.0, False),
    ],
)
def test_a_stream_waits_until_it_goes_on_or_ends(
    sent_s: float, arrivals_s: list[float], ended_s: float, waits: bool
) -> None:
    """Of those that were under way at 5: the next loss must not fall into their silence."""
    answer = Answer(schedule.requests(0, 1)[0], sent_s, ended_s, [1] * len(arrivals_s), arrivals_s)
    assert answer.waits_since(5.0) is waits


def test_the_extra_silence_is_the_longest_until_the_fleet_is_whole_beyond_the_own_calm_one() -> None:
    """A request's longest calm gap is subtracted from the longest gap while the fault lasts: not always that
    in which it struck, for what was on its way then still arrives. The next token is the one that ends it.
    """
    request = _request(0, tokens=5)
    calm = _answer(request, [1, 2, 3.5, 4, 5], [7, 8, 9, 10, 11])
    disturbed = _answer(request, [11, 12, 12.6, 15.6, 25], [7, 8, 9, 10, 11])
    course = _course(calm, disturbed, _struck("dense", "kill", 12.5))
    course.logs = {"gateway-0": [_event(13.0, "resubmit")]}
    (fault,) = verdict(course, _never, TIE)["faults"]
    assert fault["extra_s"] == [pytest.approx(1.5)]
    assert fault["next_token_s"] == [pytest.approx(3.1)]


@pytest.mark.parametrize("role", schedule.ROLES)
def test_only_streams_that_gave_the_victim_up_lost_it(role: Role) -> None:
    """Another stream that is open meanwhile does not make the percentiles better."""
    request = _request(0)
    calm, disturbed = _answer(request, [1, 2, 3, 4]), _answer(request, [11, 12, 15, 16])
    course = _course(calm, disturbed, _struck(role, "freeze", 12.5))
    course.logs = {"dense-0": [_event(12.6, "shards_lost", worker="dense-0", peer="attention-1", tokens=9)]}
    assert verdict(course, _never, TIE)["faults"][0]["extra_s"] == []
    disturbed.resumes = [0, 0, 1, 1]
    course.logs = {
        "gateway-0": [_event(12.6, "resubmit")],
        "dense-0": [_event(12.6, "shards_lost", worker="dense-0", peer="attention-0", tokens=9)],
    }
    assert verdict(course, _never, TIE)["faults"][0]["extra_s"] == [pytest.approx(2.0)]


def test_the_recompute_that_the_model_predicts_is_that_of_the_busier_dense_worker() -> None:
    """What each dense worker's sequences lost at the victim takes it full steps, both side by side."""
    request = _request(0)
    calm, disturbed = _answer(request, [1, 2, 3, 4]), _answer(request, [11, 12, 15, 16])
    course = _course(calm, disturbed, _struck("attention", "kill", 12.5))
    course.logs = {
        "dense-0": [
            _event(12.6, "shards_lost", worker="dense-0", peer="attention-0", tokens=60),
            _event(12.6, "shards_lost", worker="dense-0", peer="attention-0", tokens=40),
        ],
        "dense-1": [_event(12.6, "shards_lost", worker="dense-1", peer="attention-0", tokens=64)],
    }
    assert verdict(course, _never, TIE)["faults"][0]["recompute_s"] == pytest.approx(2 * 0.01 + 100 * 0.001)


def test_what_a_resubmission_found_less_than_the_prompt_was_computed_again() -> None:
    """A dense worker was lost: prompt tokens that had been computed and were not found are a failure."""
    request = _request(0)
    calm = _answer(request, [1, 2, 3, 4])
    course = _course(calm, _answer(request, [11, 12, 15, 16]), _struck("dense", "kill", 12.5))
    course.logs = {"dense-1": [_event(13.0, "admitted", tokens=5, found=1)]}
    report = verdict(course, _never, TIE)
    assert report["faults"][0]["prompt_tokens_recomputed"] == 2
    assert report["failures"] == ["2 prompt tokens were computed again without an attention worker's loss"]


@pytest.mark.parametrize(("found", "again"), [(5, 0), (4, 0), (3, 1)])
def test_a_lost_gateway_costs_no_token_but_that_of_the_step_under_way(found: int, again: int) -> None:
    """Of six known tokens the last is computed in any case, and the one before it where its step was under
    way; any other that was not found was computed again.
    """
    request = _request(0)
    calm = _answer(request, [1, 2, 3, 4])
    course = _course(calm, _answer(request, [11, 12, 15, 16]), _struck("gateway", "kill", 12.5))
    course.logs = {"dense-1": [_event(13.0, "admitted", tokens=6, found=found)]}
    assert verdict(course, _never, TIE)["faults"][0]["tokens_recomputed"] == again


@pytest.mark.parametrize("event", ["shards_lost", "preempted"])
@pytest.mark.parametrize(("second", "recomputed"), [(11.5, 2), (12.2, 0), (12.8, 0)])
def test_what_was_gone_before_is_no_failure_of_a_take_over(
    second: float, recomputed: int, event: str
) -> None:
    """A dense worker is struck while a sequence is silent because shards of it were lost, or it was
    preempted; a loss before the last token that came was made good by then.
    """
    request = _request(0)
    calm = _answer(request, [1, 2, 3, 4])
    course = _course(calm, _answer(request, [11, 12, 15, 16]), _struck("dense", "kill", 12.5))
    admitted = _event(13.0, "admitted", tokens=5, found=1)
    course.logs = {"dense-0": [_event(second, event, peer="attention-1")], "dense-1": [admitted]}
    assert verdict(course, _never, TIE)["faults"][0]["prompt_tokens_recomputed"] == recomputed


@pytest.mark.parametrize(("moment", "recomputed"), [(15.9, 2), (16.1, 0)])
def test_a_take_over_that_comes_when_its_client_has_everything_is_none(
    moment: float, recomputed: int
) -> None:
    """A gateway was cut off with a resubmission on its way, while the client went on elsewhere to the end."""
    request = _request(0)
    calm = _answer(request, [1, 2, 3, 4])
    struck = replace(_struck("gateway", "cut", 12.5), whole_again_s=9.0)
    course = _course(calm, _answer(request, [11, 12, 15, 16]), struck)
    course.logs = {"dense-1": [_event(moment, "admitted", tokens=5, found=1)]}
    assert verdict(course, _never, TIE)["faults"][0]["prompt_tokens_recomputed"] == recomputed


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
