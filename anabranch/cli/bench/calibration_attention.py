"""The attention side of `anabranch loadgen check`: layers asked over a lane, with no dense work between.

    python -m anabranch.cli.bench.calibration_attention SETTINGS

SETTINGS is the JSON of `StepSettings`; with an attention port the worker is another process, else it is
here. Before each layer this side reads as much memory as a layer has weights, as a dense worker does, so
that caches are as cold, and the other side as sound asleep, as in a step; and what is appended is written
to memory that was not touched before, as in an arena that fills.

Prints a line of JSON, [[sequences, rows, cached, attend_s, sent_s, lane_s], ...]: seconds over all layers of
a step in which so many sequences ask with so many rows each over so many cached tokens each: attending,
handing messages over, and whatever else there was until the reply. Means, of rounds through all shapes: what
is predicted is a sum of many steps, slow ones too, and a slow moment is not one shape's alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from statistics import fmean
from time import monotonic, thread_time

import torch

from anabranch.cli.bench.filling import FIRST_GENERATION, Filler
from anabranch.cli.bench.remote import remote_peer
from anabranch.cli.bench.step_settings import ATTENTION_EPOCH, LOCAL_WORKER, StepSettings
from cluster.config import TierConfig
from cluster.model_spec import ModelSpec
from cluster.types import KvGeometry, SequenceKey, ShardRef
from workers.attention.core import AttentionCore
from workers.cores import keep_to
from workers.dense.sequences import wire_generation
from workers.lanes.codec import torch_dtype
from workers.lanes.messages import LayerMessage, PlanRow
from workers.lanes.plans import PlanEncoder
from workers.peer import AttentionPeer

_DEADLINE_MS = 60_000
_ROUNDS = 3
_STEPS = 5
_PASSED_OVER = 2
_READS = 9
_SHAPES = (
    *((sequences, 1, cached) for sequences in (1, 4, 16) for cached in (64, 512, 2048)),
    (32, 1, 64),
    (32, 1, 512),
    (1, 1, 8192),
    (8, 1, 4096),
    *((1, rows, cached) for rows in (32, 128, 256) for cached in (128, 1024, 4096)),
)

Found = list[tuple[int, int, int, float, float, float]]
Seconds = tuple[float, float, float, float]
"""Of a step: attending, handing over, what else there was until the reply, and what this thread computed."""


class AttentionParts:
    """A lane to an attention worker, and sequences there."""

    def __init__(
        self, peer: AttentionPeer, geometry: KvGeometry, layer_bytes: int, *, is_remote: bool
    ) -> None:
        self._is_remote = is_remote
        self._lane = peer.open_lane()
        self._geometry = geometry
        self._weights = torch.ones(geometry.layers, layer_bytes // 4)
        self._filler = Filler(peer, geometry)
        self._numbers = itertools.count(1)
        self._generation = wire_generation(FIRST_GENERATION, 0)

    def measure(self) -> Found:
        """Means by shape: attending, handing over, and what is left."""
        filled = [self._filled(*shape, _ROUNDS * _STEPS) for shape in _SHAPES]
        seconds: list[list[Seconds]] = [[] for _ in _SHAPES]
        for turn in range(_ROUNDS):
            for found, (_, rows, cached), shards in zip(seconds, _SHAPES, filled, strict=True):
                found.append(self._steps(shards, rows, cached, turn * _STEPS, _STEPS))
        means = [tuple(map(fmean, zip(*found, strict=True))) for found in seconds]
        return [
            (*shape, attend_s, sent_s, lane_s)
            for shape, (attend_s, sent_s, lane_s, _) in zip(_SHAPES, means, strict=True)
        ]

    def close(self) -> None:
        """Close the lanes."""
        self._filler.close()
        self._lane.close()

    def steps(self, sequences: int, rows: int, cached: int, count: int) -> Seconds:
        """Means of so many steps."""
        return self._steps(self._filled(sequences, rows, cached, count), rows, cached, 0, count)

    def _filled(self, sequences: int, rows: int, cached: int, count: int) -> Sequence[ShardRef]:
        keys = [SequenceKey(f"calibration-{os.getpid()}-{next(self._numbers)}") for _ in range(sequences)]
        return self._filler.fill(keys, cached, count * rows)

    def _steps(self, shards: Sequence[ShardRef], rows: int, cached: int, first: int, count: int) -> Seconds:
        encoder = PlanEncoder()
        steps = [
            self._step(encoder, shards, rows, cached, cached + number * rows)
            for number in range(first, first + count)
        ][_PASSED_OVER:]
        attend_s, sent_s, lane_s, computed_s = map(fmean, zip(*steps, strict=True))
        return attend_s, sent_s, lane_s, computed_s

    def read_s(self) -> float:
        """What this thread computes to read all layers' weights: the mean of some times."""
        found = []
        for _ in range(_READS):
            began_s = thread_time()
            for layer in range(self._geometry.layers):
                self._weights[layer].sum()
            found.append(thread_time() - began_s)
        return fmean(found)

    def _step(
        self, encoder: PlanEncoder, shards: Sequence[ShardRef], rows: int, cached: int, start: int
    ) -> Seconds:
        sizes, number = self._geometry, next(self._numbers)
        dtype, asked = torch_dtype(sizes), rows * len(shards)
        query = torch.randn(asked, sizes.query_heads, sizes.head_size).to(dtype)
        key, value = (torch.randn(asked, sizes.kv_heads, sizes.head_size).to(dtype) for _ in range(2))
        plan = [PlanRow(s.shard, self._generation, start, rows, 0, cached, (7,) * rows) for s in shards]
        attended_s = sent_s = spent_s = 0.0
        computed_s = -thread_time()
        for layer in range(sizes.layers):
            self._weights[layer].sum()
            began_s = monotonic()
            difference = encoder.encode(number, 0, plan) if layer == 0 else None
            fresh = (key, value) if layer else (None, None)
            self._lane.send(LayerMessage(number, 0, layer, _DEADLINE_MS, difference, query, *fresh))
            sent_s += monotonic() - began_s
            reply = self._lane.receive(number, 0, layer, monotonic() + _DEADLINE_MS / 1000)
            spent_s += monotonic() - began_s
            attended_s += reply.compute_seconds
        self._lane.send(LayerMessage(number, 0, sizes.layers, _DEADLINE_MS, None, None, key, value))
        computed_s += thread_time()
        if not self._is_remote:  # it attends while it is sent to
            sent_s = 0.0
        return attended_s, sent_s, spent_s - attended_s - sent_s, computed_s


@contextlib.contextmanager
def attention_parts(settings: StepSettings) -> Iterator[AttentionParts]:
    """On the settings' cores, with the worker that they name."""
    cores = settings.dense_cores
    keep_to(cores)
    torch.set_num_threads(len(cores))
    config = settings.config()
    spec = ModelSpec.from_folder(settings.model)
    geometry = spec.geometry(settings.dtype, config.attention.block_tokens)
    layer_bytes = spec.parameters * torch_dtype(geometry).itemsize // spec.layers
    core = None
    if settings.attention_port:
        peer: AttentionPeer = remote_peer(settings, geometry)
    else:
        tier = TierConfig(arena=settings.arena_bytes)
        core = AttentionCore(config.attention, tier, geometry, LOCAL_WORKER, ATTENTION_EPOCH)
        peer = core.peer()
    parts = AttentionParts(peer, geometry, layer_bytes, is_remote=core is None)
    try:
        with torch.inference_mode():
            yield parts
    finally:
        parts.close()
        if core is not None:
            core.close()


def main(settings: StepSettings) -> None:
    """Measure once, and tell."""
    with attention_parts(settings) as parts:
        print(json.dumps(parts.measure()), flush=True)


if __name__ == "__main__":
    main(StepSettings.from_json(sys.argv[1]))
