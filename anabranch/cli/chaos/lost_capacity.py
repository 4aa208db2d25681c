"""Lost capacity: a role has too few processes for a while, or none, and what clients see of it."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from anabranch.cli.chaos.fleet import Fleet, send
from anabranch.cli.chaos.load import Answer
from anabranch.cli.chaos.schedule import Loss
from anabranch.cli.chaos.strike import LOOK_S, open_streams

EXCUSED = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")
"""What a request may fail with that was open while capacity was lost."""

_ECHO_S = 5.0
"""So long after the return a refusal may still reach a client, by the pauses on its way."""


@dataclass(slots=True)
class Lost:
    """A loss that happened, and the requests of its round. Times are monotonic seconds: when the processes
    were killed, when the first of them had a successor that served, and when the fleet was whole.
    """

    loss: Loss
    at_s: float
    back_s: float
    whole_s: float
    answers: list[Answer] = field(default_factory=list)
    again: list[Answer] = field(default_factory=list)
    """Those that had failed, sent again when the fleet was whole."""

    def touched(self, answer: Answer) -> bool:
        """Whether it was open at some time of the loss."""
        return answer.sent_s < self.whole_s and answer.ended_s > self.at_s

    def excuses(self, answer: Answer) -> bool:
        """Whether it may have failed as it did. What it received before is judged all the same."""
        if answer.status != "DEADLINE_EXCEEDED" and answer.ended_s > self.whole_s + _ECHO_S:
            return False
        return self.touched(answer) and answer.status in EXCUSED


async def lose(fleet: Fleet, loss: Loss, is_over: Callable[[], bool]) -> Lost | None:
    """Kill when those that are left cannot hold what runs, and see the fleet whole again. None when the load
    was over before.
    """
    while not _is_worth(fleet, loss):
        if is_over():
            return None
        await asyncio.sleep(LOOK_S)
    gone = fleet.living(loss.role)[loss.left :]
    fleet.kept_empty = frozenset(life.slot for life in gone)
    at_s = monotonic()
    for life in gone:
        life.struck = True
        send(life, signal.SIGKILL)
    await asyncio.sleep(loss.away_s)
    empty, fleet.kept_empty = fleet.kept_empty, frozenset()
    await fleet.wait(lambda: any(map(fleet.serves, empty)))
    back_s = monotonic()
    await fleet.wait_whole()
    return Lost(loss, at_s, back_s, monotonic())


def report(lost: Lost, calm: Mapping[str, Answer]) -> dict[str, Any]:
    """Of the requests a loss touched: how many failed, with what; and how many waited and went on, and how
    soon after the first successor served. One waited that was silent then for longer than ever when calm
    (requests by name).
    """
    touched = [answer for answer in lost.answers if lost.touched(answer)]
    next_token_s = []
    for answer in touched:
        longest_s = calm[answer.request.name].longest_gap_s()
        silence = next(iter(answer.silences(lost.back_s, lost.back_s)), None)
        if answer.is_whole and silence is not None and silence.seconds > longest_s:
            next_token_s.append(round(silence.ended_s - lost.back_s, 4))
    return {
        "lost": lost.loss.name,
        "away_s": round(lost.loss.away_s, 3),
        "back_s": round(lost.back_s - lost.at_s, 3),
        "whole_again_s": round(lost.whole_s - lost.at_s, 3),
        "requests": len(touched),
        "failed": dict(Counter(answer.status for answer in touched if answer.error)),
        "next_token_s": next_token_s,
        "sent_again": len(lost.again),
    }


def _is_worth(fleet: Fleet, loss: Loss) -> bool:
    """Whether more is held than the first `left` have room for."""
    lives = fleet.living(loss.role)
    left = [fleet.member(life) for life in lives[: loss.left]]
    room = sum(member.load.blocks.capacity for member in left if member is not None)
    return sum(open_streams(fleet, life) for life in lives) > room
