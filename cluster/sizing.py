"""How many workers hold and serve so many sequences of such a length. Pure, from the performance model.

Memory is exact, but for what blocks round up; times are floors (see `cluster.perfmodel`): more workers than
these may be needed for an objective, never fewer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.errors import InvalidRequest
from cluster.perfmodel import (
    DeviceSpeed,
    ModelShape,
    attention_step_floor_s,
    dense_step_floor_s,
    requests_held,
    single_step_s,
)

_DENSE_MOST = 1024


@dataclass(frozen=True, slots=True)
class Need:
    """Sequences at once, tokens of each at its end, and the longest time between two of them, if any."""

    context_tokens: int
    concurrency: int
    token_s: float | None = None


@dataclass(frozen=True, slots=True)
class Machines:
    """What a dense and an attention worker run on, and the arena of the latter. `fill`: the share of the pool
    that may be in use; the rest is for bursts, and for the cache of a worker that leaves.
    """

    dense: DeviceSpeed
    attention: DeviceSpeed
    arena_bytes: int
    fill: float


@dataclass(frozen=True, slots=True)
class Size:
    """`step_s`: least time of a decoding step in which all sequences take part; `bottleneck`: dense or
    attention, whichever takes more of it. `held`: sequences that all arenas hold at most.
    """

    cache_bytes: float
    attention_workers: int
    dense_workers: int
    step_s: float
    bottleneck: str
    held: int


def size(model: ModelShape, need: Need, machines: Machines) -> Size:
    """The fewest workers. Raises InvalidRequest where weights fit no dense worker, or no number of workers
    keeps the time between tokens.
    """
    if model.weight_bytes > machines.dense.memory_bytes:
        raise InvalidRequest(
            f"weights of {model.weight_bytes / 1e9:.1f} GB do not fit a dense worker of "
            f"{machines.dense.memory_bytes / 1e9:.0f} GB: choose another device, or a smaller dtype"
        )
    cache_bytes = need.concurrency * need.context_tokens * model.kv_token_bytes
    attention = max(1, math.ceil(cache_bytes / (machines.arena_bytes * machines.fill)))
    dense = 1
    if need.token_s is not None:
        dense = _dense_workers(model, need, machines, need.token_s)
        left_s = need.token_s - _dense_s(model, need, machines, dense)
        attention = max(attention, math.ceil(_attention_s(model, need, machines, 1) / left_s))
    dense_s = _dense_s(model, need, machines, dense)
    attention_s = _attention_s(model, need, machines, attention)
    return Size(
        cache_bytes=cache_bytes,
        attention_workers=attention,
        dense_workers=dense,
        step_s=single_step_s(dense_s, attention_s, 0.0),
        bottleneck="attention" if attention_s > dense_s else "dense",
        held=requests_held(attention * machines.arena_bytes, need.context_tokens, model),
    )


def _dense_workers(model: ModelShape, need: Need, machines: Machines, token_s: float) -> int:
    """The fewest that leave attention at least half of the time; else those that leave it some."""
    for share in (0.5, 1.0):
        for count in range(1, min(need.concurrency, _DENSE_MOST) + 1):
            if _dense_s(model, need, machines, count) < share * token_s:
                return count
    weights_s = _dense_s(model, need, machines, min(need.concurrency, _DENSE_MOST))
    raise InvalidRequest(
        f"no number of workers makes a token in {token_s * 1000:g} ms: dense work alone takes "
        f"{weights_s * 1000:.1f} ms on this device"
    )


def _dense_s(model: ModelShape, need: Need, machines: Machines, workers: int) -> float:
    return dense_step_floor_s(model, math.ceil(need.concurrency / workers), machines.dense)


def _attention_s(model: ModelShape, need: Need, machines: Machines, workers: int) -> float:
    return attention_step_floor_s(model, need.concurrency, need.context_tokens, machines.attention, workers)
