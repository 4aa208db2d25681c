"""What a course says: which promises held, and how long each kind of loss kept clients waiting. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from anabranch.cli.chaos.load import Answer
from anabranch.cli.chaos.lost_capacity import report
from anabranch.cli.chaos.run import Course
from anabranch.cli.chaos.schedule import Request
from anabranch.cli.chaos.strike import Struck

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
        "requests": len(course.disturbed),
        "tokens": sum(len(answer.tokens) for answer in course.disturbed),
        "resumes": sum(answer.resumes[-1] for answer in course.disturbed if answer.resumes),
        "starts": course.starts,
        "load_share": course.load_share,
        "near_ties": ties,
        "failures": failures,
        "faults": faults,
        "losses": [report(lost, calm_of) for lost in course.lost],
    }


def summary(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over all seeds: per role and kind how often, and p50 and p95 of the silence of streams it touched."""
    faults = [fault for seed in seeds for fault in seed["faults"]]
    groups: dict[str, list[float]] = {}
    for fault in faults:
        for name in (fault["role"], f"{fault['role']} {fault['kind']}"):
            groups.setdefault(name, []).extend(fault["extra_s"])
    return {
        "seeds": len(seeds),
        "requests": sum(seed["requests"] for seed in seeds),
        "faults": dict(sorted(Counter(f"{fault['role']} {fault['kind']}" for fault in faults).items())),
        "faults_at_points": dict(sorted(Counter(f["point"] for f in faults if f["point"]).items())),
        "near_ties": sum(len(seed["near_ties"]) for seed in seeds),
        "load_share_most": max((seed["load_share"] for seed in seeds), default=0.0),
        "failures": sum(len(seed["failures"]) for seed in seeds),
        "extra_s": {
            name: {"streams": len(values), "p50": percentile(values, 0.5), "p95": percentile(values, 0.95)}
            for name, values in sorted(groups.items())
        },
        "losses": _losses([loss for seed in seeds for loss in seed["losses"]]),
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


def percentile(values: Iterable[float], share: float) -> float | None:
    """The smallest value that at least this share of them does not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


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
    """A fault as the report names it, with the extra silence of every stream it touched."""
    until_s = struck.at_s + struck.whole_again_s
    events = _events_between(course, struck.at_s, until_s)
    touched = _touched(course, struck, events)
    recomputed = 0 if struck.fault.role == "attention" else _recomputed(course, struck, events)
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
        "extra_s": [round(extra_s, 4) for extra_s in touched],
        "prompt_tokens_recomputed": recomputed,
    }


def _touched(course: Course, struck: Struck, events: Sequence[Mapping[str, Any]]) -> list[float]:
    """Per stream that was at the victim: the silence around the fault, beyond its own longest when calm.

    A gateway's streams were opened anew, a dense worker's sequences resubmitted; an attention worker's lost a
    shard. Where a fault was over before anybody gave the victim up, all open streams count.
    """
    named = {
        "gateway": None,
        "dense": {event["request_id"] for event in events if event["event"] == "resubmit"},
        "attention": {
            event["request_id"]
            for event in events
            if event["event"] == "shards_lost" and event["peer"] == struck.slot
        },
    }[struck.fault.role]
    found: list[tuple[float, bool]] = []
    calm_of = course.calm_of()
    for disturbed in course.disturbed:
        silence = disturbed.silence_at(struck.at_s)
        if silence is not None:
            seconds, reopened = silence
            is_named = reopened if named is None else f"{disturbed.request.name}-chaos" in named
            found.append((seconds - calm_of[disturbed.request.name].longest_gap_s(), is_named))
    if any(is_named for _, is_named in found):
        return [extra_s for extra_s, is_named in found if is_named]
    return [extra_s for extra_s, _ in found]


def _recomputed(course: Course, struck: Struck, events: Sequence[Mapping[str, Any]]) -> int:
    """Prompt tokens that a take-over did not find though an output token shows that they were computed.

    Two take-overs are passed over. What an attention worker had lost is computed again in any case, even if
    that was before the fault: until then no further token comes. And a gateway that was cut off may have sent
    one on its way that arrives once its client has everything: nothing of it is computed, nobody claims it.
    """
    answers = {f"{answer.request.name}-chaos": answer for answer in course.disturbed}
    heard_s = {name: answer.heard_before(struck.at_s) for name, answer in answers.items()}
    lost = {
        event["request_id"]
        for event in _events_between(course, -math.inf, struck.at_s + struck.whole_again_s)
        if event["event"] == "shards_lost"
        and _moment(course, event) >= heard_s.get(event["request_id"], math.inf)
    }
    open_s = {name: answer.ended_s for name, answer in answers.items() if name not in lost}
    taken_over = [
        (len(answers[event["request_id"]].request.prompt), event)
        for event in events
        if event["event"] == "admitted"
        and _moment(course, event) < open_s.get(event["request_id"], -math.inf)
    ]
    return sum(
        max(0, prompt - event["found"]) for prompt, event in taken_over if event["tokens"] > prompt + 1
    )


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
