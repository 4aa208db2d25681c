"""A cluster that keeps the time of other devices: its steps last as theirs would, its tokens are its own."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import monotonic

import pytest

from cluster.emulation import EmulatedTimes
from tests.cluster_harness import DenseCluster, Output, Shape, request
from tests.models import random_prompt, tiny_model

PROMPT, TOKENS = 100, 24
DEVICE = {"flops_per_s": 1e12, "bandwidth_bytes_per_s": 1e9, "network_bytes_per_s": 1e8}
MODEL = {"weight_bytes": 2e7, "layers": 4, "hidden_size": 1024, "query_group": 1}


def emulated(attention: int) -> Shape:
    """A dense worker of one device and as many attention workers; a step takes some tens of milliseconds."""
    emulation = {
        "dilation": 1.0,
        "model": MODEL,
        "dense": DEVICE,
        "attention": DEVICE if attention else None,
        "round_trip_s": 1e-3,
    }
    return Shape(
        attention_workers=attention,
        local_blocks=0 if attention else 64,
        shard_tokens=1024,
        overrides={"emulation": emulation},
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
