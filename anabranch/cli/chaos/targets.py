"""What a call's seeds together must show beyond that no promise broke: enough faults, soon over. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anabranch.cli.chaos.schedule import ROLES

SEEDS_LEAST = 20
"""Fewer seeds do not tell how often each kind of fault comes."""

STREAMS_LEAST = 20
"""The 95th percentile of fewer is the longest."""

LOAD_MOST = 0.3
TIMES_LEAST = 5
EXTRA_MOST_S = {"attention": 2.0, "dense": 1.5, "gateway": 1.0}
"""The longest extra silence of 95 in 100 streams that lost a process of the role."""


def targets(seeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each as `target`, what was `found`, and whether it is `met`: None where too little was seen to say."""
    faults = [fault for seed in seeds for fault in seed["faults"]]
    are_enough = len(seeds) >= SEEDS_LEAST
    load = max((seed["load_share"] for seed in seeds), default=0.0)
    times = Counter(f"{fault['role']} {fault['kind']}" for fault in faults)
    kinds = sorted({kind for seed in seeds for kind in seed["kinds"]})
    rarest = min((f"{role} {kind}" for role in ROLES for kind in kinds), key=lambda pair: times[pair])
    at_points = sum(fault["point"] is not None for fault in faults)
    return [
        _target(f"load at most {LOAD_MOST:.0%} of capacity", f"{load:.1%}", load <= LOAD_MOST),
        _target(
            f"each role and kind lost at least {TIMES_LEAST} times",
            f"{rarest} {times[rarest]} times",
            times[rarest] >= TIMES_LEAST if are_enough else None,
        ),
        _target(
            "half of the faults at named points",
            f"{at_points} of {len(faults)}",
            2 * at_points >= len(faults) if are_enough else None,
        ),
        *(_soon_over(role, [fault for fault in faults if fault["role"] == role]) for role in EXTRA_MOST_S),
        _nothing_again("dense", "prompt_tokens_recomputed", faults),
        _nothing_again("gateway", "tokens_recomputed", faults),
    ]


def percentile(values: Iterable[float], share: float) -> float | None:
    """The smallest value that at least this share of them does not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def _soon_over(role: str, faults: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an attention worker's loss takes to compute again, by the model, is not counted."""
    beyond_s = [extra_s - fault["recompute_s"] for fault in faults for extra_s in fault["extra_s"]]
    p95_s = percentile(beyond_s, 0.95)
    what = "extra silence" if role != "attention" else "extra silence beyond the recompute predicted"
    return _target(
        f"{role} lost: {what}, p95 at most {EXTRA_MOST_S[role]:g} s",
        f"{'-' if p95_s is None else f'{p95_s:.2f}'} s of {len(beyond_s)} streams",
        None if p95_s is None or len(beyond_s) < STREAMS_LEAST else p95_s <= EXTRA_MOST_S[role],
    )


def _nothing_again(role: str, key: str, faults: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    again = [fault[key] for fault in faults if fault["role"] == role]
    name = f"{role} lost: no {key.replace('_', ' ')}"
    return _target(name, f"{sum(again)} in {len(again)} faults", not any(again) if again else None)


def _target(target: str, found: str, met: bool | None) -> dict[str, Any]:
    return {"target": target, "found": found, "met": met}
