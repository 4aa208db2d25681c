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
from typing import Literal, Protocol

from cluster.perfmodel import (
    DeviceSpeed,
    ModelShape,
    dense_step_floor_s,
    lane_floor_s,
    read_floor_s,
    single_step_s,
    staggered_step_s,
)
from cluster.policies.micro_batches import MicroBatches
from cluster.policies.micro_batches import work_of as chunk_work
from loadgen.simulation.machines import Efficiencies, Shape
from loadgen.simulation.work import PlannedRow, Work, last_rows, work_of

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


@dataclass(frozen=True, slots=True)
class MicroBatchTimes:
    """Seconds of one micro-batch over all layers; `attention_s`: of each attention worker."""

    dense_s: float
    attention_s: tuple[float, ...]
    lane_s: float

    @property
    def slowest_s(self) -> float:
        """Attention of the worker that the others wait for."""
        return max(self.attention_s)


@dataclass(frozen=True)
class StepModel:
    """What steps of one dense worker of a cluster take."""

    model: ModelShape
    shape: Shape
    efficiencies: Efficiencies = field(default_factory=Efficiencies)
    switches: Switches = field(default_factory=Switches)

    @property
    def workers(self) -> int:
        """Attention workers that one dense worker uses."""
        return self.shape.attention.devices if self.shape.attention else 1

    def step(self, parts: Sequence[MicroBatchTimes]) -> StepTimes:
        """Of one micro-batch, or of two that are staggered; but the overhead where there is none."""
        overhead_s = self.efficiencies.step_s
        if not parts:
            return StepTimes(overhead_s, 0.0, (0.0,) * self.workers, 0.0, 1)
        dense_s, lane_s = sum(part.dense_s for part in parts), sum(part.lane_s for part in parts)
        attention_s = tuple(map(sum, zip(*(part.attention_s for part in parts), strict=True)))
        if len(parts) == 1:
            wall_s = single_step_s(dense_s, max(attention_s), lane_s)
        else:
            first, second = parts
            wall_s = staggered_step_s(
                first.dense_s,
                second.dense_s,
                first.slowest_s,
                second.slowest_s,
                max(first.lane_s, second.lane_s),
            )
        return StepTimes(wall_s + overhead_s, dense_s, attention_s, lane_s, len(parts))

    def times(self, work: Work) -> StepTimes:
        """Of work that may be cut anywhere: as one micro-batch, or as two equal halves where they pay."""
        whole = self.step([self.micro_batch(work)])
        if not self.switches.staggers or self.shape.attention is None or work.tokens < 2:
            return whole
        halves = self.step([self.micro_batch(work, 0.5)] * 2)
        return halves if whole.wall_s >= _STAGGERING_GAIN_LEAST * halves.wall_s else whole

    def micro_batch(self, work: Work, share: float = 1.0) -> MicroBatchTimes:
        """A `share` of the work, as one."""
        attention_s = tuple(share * self._attention_s(work, worker) for worker in range(self.workers))
        dense_s = self._dense_s(share * work.tokens) + share * self._own_attention_s(work)
        lane_s = self._lane_s(work, max(attention_s), share) if self.shape.attention is not None else 0.0
        return MicroBatchTimes(dense_s, attention_s, lane_s)

    def _dense_s(self, tokens: float) -> float:
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
        """Exchange of a `share` of the work over all layers: a round trip each where there are queries, and
        the bytes at the busiest network card. With overlap, keys and values travel beside attention.
        """
        width = self.model.hidden_size * self.model.element_bytes * self.model.layers * share
        dense_rate, worker_rate = self._network_bytes_per_s
        ways_s = 2 * width * max(sum(work.queries) / dense_rate, max(work.queries) / worker_rate)
        cache_width = 2 * width / self.model.query_group
        cache_s = cache_width * max(sum(work.appended) / dense_rate, max(work.appended) / worker_rate)
        if self.switches.overlaps:
            cache_s = max(0.0, cache_s - attention_s)
        trips_s = (
            lane_floor_s(self.model.layers, self.efficiencies.round_trip_s) if any(work.queries) else 0.0
        )
        return trips_s + ways_s + cache_s

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


class ModelledSteps:
    """Prices steps of one dense worker. Owns who is in which micro-batch, and the choice of one or two, which
    follows from what steps took, as in a real one.
    """

    def __init__(
        self, model: StepModel, micro_batches: Literal["auto", 1, 2], *, prompts_elsewhere: bool = False
    ) -> None:
        """`micro_batches` as configured; `prompts_elsewhere`: chunks cost nothing but their last row, as
        where another cluster computes them and their cache comes in the gaps (Lamina's setting).
        """
        self._model = model
        self._micro_batches = MicroBatches(micro_batches if model.switches.staggers else 1)
        self._prompts_elsewhere = prompts_elsewhere

    @property
    def workers(self) -> int:
        """See `Pricing`."""
        return self._model.workers

    @property
    def call_s(self) -> float:
        """See `Pricing`."""
        return self._model.efficiencies.call_s

    def price(self, rows: Sequence[PlannedRow]) -> StepTimes:
        """See `Pricing`."""
        if self._prompts_elsewhere:
            rows = last_rows(rows)
        is_remote = self._model.shape.attention is not None
        split = self._micro_batches.split(rows, remote=is_remote) if rows else []
        parts = [self._model.micro_batch(work_of(half, self.workers)) for half in split]
        if is_remote:
            for half, part in zip(split, parts, strict=True):
                self._micro_batches.note(chunk_work(half), part.dense_s, part.slowest_s, part.lane_s)
        return self._model.step(parts)
