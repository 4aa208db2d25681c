"""A cluster that keeps the time of other devices: its steps last as theirs would, its tokens are its own."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import pytest

from cluster.emulation import EmulatedTimes
from tests.cluster_harness import DenseCluster, Output, Shape, request
from tests.models import random_prompt, tiny_model

PROMPT, TOKENS = 100, 24
DEVICE = {"flops_per_s": 1e12, "bandwidth_bytes_per_s": 1e9, "network_bytes_per_s": 1e8}
MODEL = {"weight_bytes": 2e7, "layers": 4, "hidden_size": 1024, "query_group": 1}


BALANCED = MODEL | {"hidden_size": 4096}, DEVICE | {"flops_per_s": 2e9}
"""Of four rows dense work takes twice as long as of two, and attention as long as dense work of two."""


def emulated(
    attention: int,
    model: dict[str, Any] = MODEL,
    dense: dict[str, Any] = DEVICE,
    micro_batches: int | str = "auto",
) -> Shape:
    """A dense worker of one device and as many attention workers; a step takes some tens of milliseconds."""
    emulation = {
        "dilation": 1.0,
        "model": model,
        "dense": dense,
        "attention": DEVICE if attention else None,
        "round_trip_s": 1e-3,
    }
    return Shape(
        attention_workers=attention,
        local_blocks=0 if attention else 64,
        shard_tokens=1024,
        overrides={"emulation": emulation, "dense": {"micro_batches": micro_batches}},
    )


def decoded(folder: Path, shape: Shape) -> tuple[Output, float, EmulatedTimes | None]:
    """What came of one request, the seconds of its median step, and the times that are kept."""
    with DenseCluster(folder, shape) as cluster:
        arrived: list[float] = []
        submission = request(random_prompt(PROMPT, seed=1), TOKENS)
        cluster.submit(submission)
        for count in range(1, TOKENS + 1):
            cluster.listener.wait(submission, partial(_has, count))
            arrived.append(monotonic())
        output = cluster.listener.wait(submission)
        emulation = cluster.config.emulation
        times = EmulatedTimes(emulation, cluster.decoder.spec.layers) if emulation else None
    return output, median(later - earlier for earlier, later in pairwise(arrived[2:])), times


def _has(count: int, output: Output) -> bool:
    return len(output.token_ids) >= count


@pytest.mark.parametrize("attention", [0, 1])
def test_a_step_lasts_as_long_as_on_the_emulated_devices(tmp_path: Path, attention: int) -> None:
    """Dense work, attending and lane of a decoding step add up to what the model says of them, wherever the
    cache lies; the tokens are those of a cluster that keeps its own time.
    """
    folder = tiny_model(tmp_path)
    output, step_s, times = decoded(folder, emulated(attention))
    assert times is not None
    layer_s = (
        times.dense_s(1, 0) + times.attend_s([(1, PROMPT + TOKENS // 2)]) + times.lane_s([1] * attention)
    )
    assert step_s == pytest.approx(times.layers * layer_s, rel=0.3)
    plain = Shape(attention_workers=attention, local_blocks=0 if attention else 64, shard_tokens=1024)
    assert output.token_ids == decoded(folder, plain)[0].token_ids


def test_two_micro_batches_hide_one_side_behind_the_other(tmp_path: Path) -> None:
    """Several sequences, staggered: a decoding step takes less than both sides one after the other."""
    folder = tiny_model(tmp_path)
    steps_s = [_step_of_four(folder, emulated(1, *BALANCED, micro_batches)) for micro_batches in (1, 2)]
    assert steps_s[1] < 0.95 * steps_s[0]


def _step_of_four(folder: Path, shape: Shape) -> float:
    """Seconds of the median step in which four sequences decode."""
    with DenseCluster(folder, shape) as cluster:
        submissions = [request(random_prompt(PROMPT, seed=seed), TOKENS) for seed in range(4)]
        for submission in submissions:
            cluster.submit(submission)
        last = submissions[-1]
        arrived: list[float] = []
        for count in range(1, TOKENS - 4):  # the first ends, and the last decodes alone, a few steps later
            cluster.listener.wait(last, partial(_has, count))
            arrived.append(monotonic())
        for submission in submissions:
            cluster.listener.wait(submission)
        return median(later - earlier for earlier, later in pairwise(arrived[2:]))
