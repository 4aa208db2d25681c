"""How long a step takes on modelled hardware: the performance model's floors over efficiencies. Pure.

Sources: Lamina, arXiv 2405.01814 (MTIME, ATIME, exchange, overlap, staggering). What the paper leaves to
another cluster is counted here, since ours does it: prompts are computed in chunks beside decoding rows
(Sarathi-Serve), whose tokens cost dense work, attend to their sequence's cache where it lies, and to each
other in the dense worker. Exchange within a dense worker of several devices is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from cluster.perfmodel import (
    DeviceSpeed,
    ModelShape,
    dense_step_floor_s,
    lane_floor_s,
    read_floor_s,
    single_step_s,
    staggered_step_s,
)
from loadgen.simulation.machines import Efficiencies, Shape
from loadgen.simulation.work import PlannedRow, Work, work_of

_STAGGERING_GAIN_LEAST = 1.03
"""As the dense worker has it: two micro-batches must promise this much."""


@dataclass(frozen=True, slots=True)
class Switches:
    """Techniques that can be left out. `overlaps`: keys and values travel while old tokens are attended to.
    `staggers`: two micro-batches where that is faster.
    """

    overlaps: bool = True
    staggers: bool = True


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step. `attention_s`: of each attention worker; `lane_s` includes what is hidden."""

    wall_s: float
    dense_s: float
    attention_s: tuple[float, ...]
    lane_s: float
    micro_batches: int

    @property
    def slowest_s(self) -> float:
        """Attention of the worker that the others wait for."""
        return max(self.attention_s)


class Pricing(Protocol):
    """Says what the steps of one dense worker take."""

    @property
    def workers(self) -> int:
        """Attention workers that the dense worker uses; 1 where the cache is its own."""
        ...

    @property
    def call_s(self) -> float:
        """Of a call between processes."""
        ...

    def price(self, rows: Sequence[PlannedRow]) -> StepTimes:
        """A step of these rows."""
        ...


@dataclass(frozen=True)
class StepModel:
    """Prices steps of one dense worker of a cluster."""

    model: ModelShape
    shape: Shape
    efficiencies: Efficiencies = field(default_factory=Efficiencies)
    switches: Switches = field(default_factory=Switches)
    prompts_elsewhere: bool = False
    """Chunks cost nothing here, as where another cluster computes them and their cache comes in the gaps
    (Lamina's setting).
    """

    @property
    def workers(self) -> int:
        """Attention workers that one dense worker uses."""
        return self.shape.attention.devices if self.shape.attention else 1

    @property
    def call_s(self) -> float:
        """See `Pricing`."""
        return self.efficiencies.call_s

    def price(self, rows: Sequence[PlannedRow]) -> StepTimes:
        """See `Pricing`."""
        return self.times(work_of(rows, self.workers, prompts_elsewhere=self.prompts_elsewhere))

    def times(self, work: Work) -> StepTimes:
        """A step of this work, its micro-batches equal halves; but the overhead where there is none."""
        if not work.tokens:
            return StepTimes(self.efficiencies.step_s, 0.0, (0.0,) * self.workers, 0.0, 1)
        attention_s = tuple(self._attention_s(work, worker) for worker in range(self.workers))
        slowest_s = max(attention_s)
        own_s = self._own_attention_s(work)
        dense_s = self._dense_s(work.tokens) + own_s
        if self.shape.attention is None:
            wall_s = single_step_s(dense_s, slowest_s, 0.0) + self.efficiencies.step_s
            return StepTimes(wall_s, dense_s, attention_s, 0.0, 1)
        single_s = single_step_s(dense_s, slowest_s, self._lane_s(work, slowest_s, 1.0))
        wall_s, dense_s, batches = self._staggered(work, single_s, dense_s, own_s, slowest_s)
        lane_s = self._lane_s(work, slowest_s, 1 / batches)
        return StepTimes(wall_s + self.efficiencies.step_s, dense_s, attention_s, lane_s, batches)

    def _staggered(
        self, work: Work, single_s: float, dense_s: float, own_s: float, slowest_s: float
    ) -> tuple[float, float, int]:
        """(seconds, dense seconds, micro-batches): of two equal halves where they pay, else as it was."""
        if not self.switches.staggers or work.tokens < 2:
            return single_s, dense_s, 1
        first = work.tokens // 2
        first_s, second_s = (self._dense_s(part) + own_s / 2 for part in (first, work.tokens - first))
        lane_s = self._lane_s(work, slowest_s / 2, 0.5)
        wall_s = staggered_step_s(first_s, second_s, slowest_s / 2, slowest_s / 2, lane_s)
        pays = single_s >= _STAGGERING_GAIN_LEAST * wall_s
        return (wall_s, first_s + second_s, 2) if pays else (single_s, dense_s, 1)

    def _dense_s(self, tokens: int) -> float:
        return dense_step_floor_s(self.model, tokens, self._dense_speed, self.shape.dense.devices)

    def _own_attention_s(self, work: Work) -> float:
        speed = self._dense_speed.flops_per_s * self.shape.dense.devices
        return self._score_flop * work.own_scores / speed if work.own_scores else 0.0

    def _attention_s(self, work: Work, worker: int) -> float:
        """Cache is read once for a decoding row and once for a chunk, whose queries share what was read."""
        speed, devices = self._attention_speed
        bandwidth, flops = speed.bandwidth_bytes_per_s * devices, speed.flops_per_s * devices
        seconds = read_floor_s(work.read_tokens[worker] * self.model.kv_token_bytes, bandwidth)
        for place, queries, tokens in work.chunks:
            if place == worker:
                compute_s = self._score_flop * queries * tokens / flops
                seconds += max(compute_s, read_floor_s(tokens * self.model.kv_token_bytes, bandwidth))
        return seconds

    def _lane_s(self, work: Work, attention_s: float, share: float) -> float:
        """Exchange of a `share` of the work over all layers: a round trip each, and the bytes at the busiest
        network card. With overlap, keys and values travel while attention goes on.
        """
        width = self.model.hidden_size * self.model.element_bytes * self.model.layers * share
        dense_rate, worker_rate = self._network_bytes_per_s
        ways_s = 2 * width * max(sum(work.queries) / dense_rate, max(work.queries) / worker_rate)
        cache_width = 2 * width / self.model.query_group
        cache_s = cache_width * max(sum(work.appended) / dense_rate, max(work.appended) / worker_rate)
        if self.switches.overlaps:
            cache_s = max(0.0, cache_s - attention_s)
        return lane_floor_s(self.model.layers, self.efficiencies.round_trip_s) + ways_s + cache_s

    @cached_property
    def _score_flop(self) -> float:
        """Of one query and one key over all layers and heads: 2 d for the product, 2 d for the values."""
        return 4.0 * self.model.hidden_size * self.model.layers

    @cached_property
    def _dense_speed(self) -> DeviceSpeed:
        return self._reached(self.shape.dense.kind.speed)

    @cached_property
    def _attention_speed(self) -> tuple[DeviceSpeed, int]:
        """Of the devices that attend together: one attention worker, or a whole dense worker."""
        if self.shape.attention is None:
            return self._dense_speed, self.shape.dense.devices
        return self._reached(self.shape.attention.kind.speed), 1

    @cached_property
    def _network_bytes_per_s(self) -> tuple[float, float]:
        """Of a dense worker's devices together, and of an attention worker."""
        assert self.shape.attention is not None
        dense, attention = self.shape.dense.kind, self.shape.attention.kind
        assert dense.network_bytes_per_s is not None, "see Shape"
        assert attention.network_bytes_per_s is not None, "see Shape"
        share = self.efficiencies.network
        dense_rate = share * dense.network_bytes_per_s * self.shape.dense.devices
        return dense_rate, share * attention.network_bytes_per_s

    def _reached(self, speed: DeviceSpeed) -> DeviceSpeed:
        return DeviceSpeed(
            speed.flops_per_s * self.efficiencies.flops,
            speed.bandwidth_bytes_per_s * self.efficiencies.bandwidth,
            speed.memory_bytes,
        )
