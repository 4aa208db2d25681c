"""How many workers of a role there should be, from what the pool reported lately. Pure.

Three measures: the share of the KV pool in use, sequences that wait, and the share of their time that dense
workers compute. Workers are added soon and by as many as the measure asks for; they leave one at a time, when
those that stay would still be at ease, since a worker that leaves moves its cache to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Scaled = Literal["attention", "dense"]
"""Roles whose number follows the load."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The pool at one moment: shares from 0 to 1, sequences that wait on all dense workers together.

    `busy_share`: the mean over dense workers since the sample before; None where there is none yet.
    `leaving`: whether a member drains, whose cache is on its way.
    """

    at_s: float
    pool_share: float
    waiting: int
    busy_share: float | None
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class Bounds:
    """Fewest and most workers of a role."""

    least: int
    most: int

    def clamp(self, count: int) -> int:
        """The nearest number within."""
        return min(max(count, self.least), self.most)


@dataclass(frozen=True, slots=True)
class AutoscalerPolicy:
    """`pool_share`, `busy_share`: what is aimed at; above it for `out_after_s`, workers are added. Below
    `ease` of it for `in_after_s`, as if one had left already, one leaves. For `cool_down_s` after a change
    of a role, it is left alone.
    """

    pool_share: float = 0.75
    busy_share: float = 0.75
    ease: float = 0.8
    out_after_s: float = 30.0
    in_after_s: float = 300.0
    cool_down_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Change:
    """A role gets another number of workers, and why."""

    role: Scaled
    count: int
    reason: str


def decide(
    samples: Sequence[Sample],
    counts: Mapping[Scaled, int],
    bounds: Mapping[Scaled, Bounds],
    changed_s: Mapping[Scaled, float],
    policy: AutoscalerPolicy,
) -> tuple[Change, ...]:
    """Changes that the samples, oldest first, ask for now; the last one is now. `changed_s`: when a role was
    changed last, if ever. A role outside its bounds is brought inside whatever the load and the cool-down.
    """
    if not samples:
        return ()
    wanted = {"attention": _attention, "dense": _dense}
    found = []
    for role, count in counts.items():
        inside = bounds[role].clamp(count)
        if inside != count:
            found.append(Change(role, inside, f"the bounds are {bounds[role].least} to {bounds[role].most}"))
        elif samples[-1].at_s - changed_s.get(role, -math.inf) >= policy.cool_down_s:
            target, reason = wanted[role](samples, count, policy)
            target = bounds[role].clamp(target)
            if target != count:
                found.append(Change(role, target, reason))
    return tuple(found)


def _attention(samples: Sequence[Sample], count: int, policy: AutoscalerPolicy) -> tuple[int, str]:
    shares = [sample.pool_share for sample in _since(samples, policy.out_after_s)]
    if shares and min(shares) > policy.pool_share:
        return _grown(count, shares[-1], policy.pool_share), f"the pool is {shares[-1]:.0%} full"
    calm = [sample.pool_share for sample in _since(samples, policy.in_after_s)]
    if _may_leave(samples, calm, count, policy.pool_share * policy.ease):
        return count - 1, f"the pool was at most {max(calm):.0%} full"
    return count, ""


def _dense(samples: Sequence[Sample], count: int, policy: AutoscalerPolicy) -> tuple[int, str]:
    lately = _since(samples, policy.out_after_s)
    shares = [sample.busy_share for sample in lately if sample.busy_share is not None]
    if shares and min(shares) > policy.busy_share:
        return _grown(
            count, shares[-1], policy.busy_share
        ), f"dense workers compute {shares[-1]:.0%} of the time"
    # Where the pool is full, sequences wait for room, which a dense worker does not bring.
    if lately and all(sample.waiting and sample.pool_share <= policy.pool_share for sample in lately):
        return count + 1, f"{lately[-1].waiting} sequences wait, and not for room"
    calm = _since(samples, policy.in_after_s)
    busy = [sample.busy_share for sample in calm if sample.busy_share is not None]
    is_calm = len(busy) == len(calm) and not any(sample.waiting for sample in calm)
    if is_calm and _may_leave(samples, busy, count, policy.busy_share * policy.ease):
        return count - 1, f"dense workers computed at most {max(busy):.0%} of the time"
    return count, ""


def _may_leave(samples: Sequence[Sample], shares: Sequence[float], count: int, share: float) -> bool:
    """Whether one fewer would still have been below a share, all the time; while one leaves, nobody else."""
    if count < 2 or not shares or samples[-1].leaving:
        return False
    return max(shares) * count / (count - 1) < share


def _grown(count: int, share: float, aim: float) -> int:
    return max(count + 1, math.ceil(count * share / aim))


def _since(samples: Sequence[Sample], window_s: float) -> Sequence[Sample]:
    """The samples of the last `window_s`; none where they do not reach back so far."""
    begin_s = samples[-1].at_s - window_s
    return [sample for sample in samples if sample.at_s >= begin_s] if samples[0].at_s <= begin_s else []
