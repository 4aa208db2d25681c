"""What a course says: which promises held, and how long each kind of loss kept clients waiting. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from anabranch.cli.chaos.load import Answer
from anabranch.cli.chaos.lost_capacity import report
from anabranch.cli.chaos.run import STEP_TOKENS, Course
from anabranch.cli.chaos.schedule import Request
from anabranch.cli.chaos.strike import Struck
from anabranch.cli.chaos.targets import percentile, targets

NEAR_TIES_MOST = 0.005
"""Share of requests whose comparison may end at a near-tie."""

Gap = Callable[[Request, Sequence[int]], float]
"""How close the choice behind some output tokens of a request was; see `near_ties`."""


def verdict(course: Course, gap_at: Gap, near_tie: float) -> dict[str, Any]:
    """One seed's result. `failures` is empty where every promise held."""
    failures = list(course.problems)
    ties: list[dict[str, Any]] = []
    calm_of = course.calm_of()
    for disturbed in [*course.disturbed, *(answer for lost in course.lost for answer in lost.again)]:
        calm = calm_of[disturbed.request.name]
        is_excused = any(lost.excuses(disturbed) for lost in course.lost)
        failures += _answer_failures(calm, disturbed, is_excused=is_excused)
        difference = _first_difference(calm, disturbed)
        if difference is not None:
            gap = gap_at(calm.request, calm.tokens[:difference])
            found = {"request": calm.request.name, "index": difference, "gap": gap}
            if gap < near_tie:
                ties.append(found)
            else:
                failures.append(f"{calm.request.name}: token {difference} differs, by no near-tie: {gap:.3g}")
    if len(ties) > NEAR_TIES_MOST * len(course.calm):
        failures.append(f"{len(ties)} near-ties in {len(course.calm)} requests")
    if not course.struck and not course.lost:
        failures.append("no fault struck while a stream was open: send more requests (--requests)")
    faults = [_fault(course, struck) for struck in course.struck]
    recomputed = sum(fault["prompt_tokens_recomputed"] for fault in faults)
    if recomputed:
        failures.append(f"{recomputed} prompt tokens were computed again without an attention worker's loss")
    return {
        "seed": course.settings.seed,
        "kinds": course.settings.kinds,
        "requests": len(course.disturbed),
        "tokens": sum(len(answer.tokens) for answer in course.disturbed),
        "resumes": sum(answer.resumes[-1] for answer in course.disturbed if answer.resumes),
        "starts": course.starts,
        "moves": sum(event["event"] == "moved" for events in course.logs.values() for event in events),
        "load_share": course.load_share,
        "near_ties": ties,
        "failures": failures,
        "faults": faults,
        "losses": [report(lost, calm_of) for lost in course.lost],
    }


def summary(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over all seeds: per role and kind how often, p50 and p95 of the silence of streams it touched and of
    the time to their next tokens, and which targets were met. Those are not for lost capacity.
    """
    faults = [fault for seed in seeds for fault in seed["faults"]]
    losses = [loss for seed in seeds for loss in seed["losses"]]
    return {
        "seeds": len(seeds),
        "requests": sum(seed["requests"] for seed in seeds),
        "faults": dict(sorted(Counter(f"{fault['role']} {fault['kind']}" for fault in faults).items())),
        "faults_at_points": dict(sorted(Counter(f["point"] for f in faults if f["point"]).items())),
        "near_ties": sum(len(seed["near_ties"]) for seed in seeds),
        "load_share_most": max((seed["load_share"] for seed in seeds), default=0.0),
        "failures": sum(len(seed["failures"]) for seed in seeds),
        "extra_s": _grouped(faults, "extra_s"),
        "next_token_s": _grouped(faults, "next_token_s"),
        "targets": [] if losses else targets(seeds),
        "losses": _losses(losses),
    }


def _grouped(faults: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Per role, and per role and kind, of the streams that lost a process."""
    groups: dict[str, list[float]] = {}
    for fault in faults:
        for name in (fault["role"], f"{fault['role']} {fault['kind']}"):
            groups.setdefault(name, []).extend(fault[key])
    return {
        name: {"streams": len(values), "p50": percentile(values, 0.5), "p95": percentile(values, 0.95)}
        for name, values in sorted(groups.items())
    }


def _losses(losses: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per loss: requests it touched, those that failed or waited, and how soon the next tokens came."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for loss in losses:
        groups.setdefault(loss["lost"], []).append(loss)
    found = {}
    for name, alike in sorted(groups.items()):
        waited = [seconds for loss in alike for seconds in loss["next_token_s"]]
        found[name] = {
            "times": len(alike),
            "requests": sum(loss["requests"] for loss in alike),
            "failed": dict(sum((Counter(loss["failed"]) for loss in alike), Counter())),
            "waited": len(waited),
            "p50": percentile(waited, 0.5),
            "p95": percentile(waited, 0.95),
        }
    return found


def _answer_failures(calm: Answer, disturbed: Answer, *, is_excused: bool) -> list[str]:
    name = calm.request.name
    runs = (("undisturbed", calm), ("disturbed", disturbed))
    failures = [f"{name}, {run}: it went on beyond its deadline" for run, answer in runs if answer.is_late]
    return failures + [
        f"{name}, {run}: {answer.error or f'{len(answer.tokens)} of {answer.request.max_tokens} tokens'}"
        for run, answer in (runs[:1] if is_excused else runs)
        if not answer.is_whole
    ]


def _first_difference(calm: Answer, disturbed: Answer) -> int | None:
    pairs = zip(calm.tokens, disturbed.tokens, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), None)


def _fault(course: Course, struck: Struck) -> dict[str, Any]:
    """A fault as the report names it, with the extra silence of every stream that lost its process."""
    until_s = struck.at_s + struck.whole_again_s
    events = _events_between(course, struck.at_s, until_s)
    touched = _touched(course, struck, events)
    prompt_again, all_again = (0, 0) if struck.fault.role == "attention" else _again(course, struck, events)
    return {
        "at": datetime.fromtimestamp(struck.at_s + course.clock_offset_s, UTC).isoformat(),
        "role": struck.fault.role,
        "kind": struck.fault.kind,
        "point": struck.fault.point,
        "lasted_s": struck.fault.lasts_s,
        "slot": struck.slot,
        "streams": struck.streams,
        "replaced": struck.replaced,
        "whole_again_s": round(struck.whole_again_s, 3),
        "extra_s": [round(extra_s, 4) for extra_s, _ in touched],
        "next_token_s": [round(next_s, 4) for _, next_s in touched],
        "recompute_s": round(_predicted_s(struck, events), 4),
        "prompt_tokens_recomputed": prompt_again,
        "tokens_recomputed": all_again,
    }


def _touched(
    course: Course, struck: Struck, events: Sequence[Mapping[str, Any]]
) -> list[tuple[float, float]]:
    """Per stream that was open and gave the victim up: the longest silence from the fault until the fleet was
    whole, beyond its own longest when calm; and the time from the fault to that silence's end.

    A gateway's streams were opened anew, a dense worker's sequences resubmitted; an attention worker's lost a
    shard. Where a fault was over before anybody gave the victim up, nobody lost it.
    """
    named = {
        "gateway": None,
        "dense": {event["request_id"] for event in events if event["event"] == "resubmit"},
        "attention": {event["request_id"] for event in _lost_shards(struck, events)},
    }[struck.fault.role]
    found = []
    calm_of = course.calm_of()
    for disturbed in course.disturbed:
        silences = disturbed.silences(struck.at_s, struck.at_s + struck.whole_again_s)
        is_reopened = any(silence.is_reopened for silence in silences)
        if silences and (is_reopened if named is None else f"{disturbed.request.name}-chaos" in named):
            longest = max(silences, key=lambda silence: silence.seconds)
            calm_s = calm_of[disturbed.request.name].longest_gap_s()
            found.append((longest.seconds - calm_s, longest.ended_s - struck.at_s))
    return found


def _predicted_s(struck: Struck, events: Sequence[Mapping[str, Any]]) -> float:
    """How long the steps are that compute again what an attention worker's loss took, by the performance
    model: each dense worker's full ones, one after the other.
    """
    tokens: Counter[str] = Counter()
    for event in _lost_shards(struck, events):
        tokens[event["worker"]] += event["tokens"]
    step = struck.step
    again_s = (math.ceil(lost / STEP_TOKENS) * step.base_s + lost * step.each_s for lost in tokens.values())
    return max(again_s, default=0.0)


def _lost_shards(struck: Struck, events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [event for event in events if event["event"] == "shards_lost" and event["peer"] == struck.slot]


def _again(course: Course, struck: Struck, events: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Prompt tokens, and tokens in all, that a take-over did not find though they had been computed, as an
    output token shows. Of all, two are no loss: the last one known, which no step had yet, and the one before
    it, whose step was under way.

    Some take-overs are passed over. What an attention worker had lost, or a sequence gave up for want of
    room, is computed again in any case, even if that was before the fault: until then no further token comes.
    And a gateway that was cut off may have sent one on its way that arrives once its client has everything:
    nothing of it is computed, nobody claims it.
    """
    answers = {f"{answer.request.name}-chaos": answer for answer in course.disturbed}
    heard_s = {name: answer.heard_before(struck.at_s) for name, answer in answers.items()}
    lost = {
        event["request_id"]
        for event in _events_between(course, -math.inf, struck.at_s + struck.whole_again_s)
        if event["event"] in ("shards_lost", "preempted")
        and _moment(course, event) >= heard_s.get(event["request_id"], math.inf)
    }
    open_s = {name: answer.ended_s for name, answer in answers.items() if name not in lost}
    prompt_again = all_again = 0
    for event in (event for event in events if event["event"] == "admitted"):
        name = event["request_id"]
        is_open = _moment(course, event) < open_s.get(name, -math.inf)
        prompt = len(answers[name].request.prompt) if is_open else 0
        if is_open and event["tokens"] > prompt + 1:
            prompt_again += max(0, prompt - event["found"])
            all_again += max(0, event["tokens"] - 2 - event["found"])
    return prompt_again, all_again


def _moment(course: Course, event: Mapping[str, Any]) -> float:
    """When an event was logged, in monotonic seconds."""
    return datetime.fromisoformat(event["time"]).timestamp() - course.clock_offset_s


def _events_between(course: Course, from_s: float, until_s: float) -> list[Mapping[str, Any]]:
    """What any process logged in a stretch of monotonic time."""
    return [
        event
        for events in course.logs.values()
        for event in events
        if from_s <= _moment(course, event) <= until_s
    ]
