"""Taking samples of several things in turn, so that a machine's moods reach all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping

WARM_UP = 2
"""Samples of each that are thrown away: first touches, caches, the clock of an idle core."""


def in_turn(samplers: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """`repeats` samples of each, one after the other in rounds; every second round goes backwards."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order = list(samplers)
    for turn in range(WARM_UP + repeats):
        for name in order:
            value = samplers[name]()
            if turn >= WARM_UP:
                samples[name].append(value)
        order.reverse()
    return samples
