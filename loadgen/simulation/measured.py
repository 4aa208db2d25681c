"""How long a step takes on a calibrated machine: its parts, put together as the dense worker does. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.perfmodel import staggered_step_s
from cluster.policies.micro_batches import MicroBatches
from cluster.policies.micro_batches import work_of as chunk_work
from loadgen.simulation.calibration import AttendCost, Calibration, Lanes
from loadgen.simulation.steps import StepTimes
from loadgen.simulation.work import PlannedRow, Work, work_of


@dataclass(frozen=True, slots=True)
class _Half:
    """One micro-batch: seconds of both sides over all layers, and of the lanes. `slowest_s`: of the attention
    worker that answers last, behind others on its core.
    """

    body_s: float
    own_s: float
    attention_s: tuple[float, ...]
    slowest_s: float
    sent_s: float
    lane_s: float
    turns_s: float
    """What asking costs a core that is shared, instead of `sent_s`; else 0."""

    @property
    def dense_s(self) -> float:
        return self.body_s + self.own_s + self.sent_s

    @property
    def core_s(self) -> float:
        return self.body_s + self.own_s + (self.turns_s or self.sent_s)

    @property
    def alone_s(self) -> float:
        """In a step of its own: chunks attend to themselves while the worker attends to what lies there."""
        return self.body_s + self.sent_s + max(self.own_s, self.slowest_s + self.lane_s)


class MeasuredSteps:
    """Prices steps of one dense worker of one core. Owns who is in which micro-batch, which follows from what
    steps took, as in a real one.
    """

    def __init__(
        self,
        calibration: Calibration,
        lanes: Lanes,
        workers: int,
        micro_batches: Literal["auto", 1, 2],
        call_s: float,
        *,
        shares_core: bool = False,
        attention_cores: int = 0,
    ) -> None:
        """`micro_batches` as configured; `call_s`: see `Pricing`; `shares_core`: with other dense workers;
        `attention_cores`: on which attention workers take turns, 0 where each has its own.
        """
        self.workers = workers
        self.call_s = call_s
        self._calibration = calibration
        self._lanes = lanes
        self._shares_core = shares_core
        self._attention_cores = attention_cores or workers
        self._cost: AttendCost = calibration.attend[lanes]
        self._micro_batches = MicroBatches(micro_batches)

    def price(self, rows: Sequence[PlannedRow]) -> StepTimes:
        """See `Pricing`."""
        parts = self._micro_batches.split(rows, remote=self._lanes != "local")
        halves = [self._half(work_of(part, self.workers)) for part in parts]
        work = work_of(rows, self.workers)
        head_s = self._calibration.head_s(work.samples)
        layers_s = self._layers_s(halves)
        if self._lanes != "local":
            for part, half in zip(parts, halves, strict=True):
                dense_s = half.body_s + half.own_s + head_s / len(parts)
                self._micro_batches.note(chunk_work(part), dense_s, half.slowest_s, half.lane_s + half.sent_s)
        shared_s = head_s + work.sequences * self._calibration.sequence_s
        shared_s += self._calibration.served_s(work.samples)
        # Where attention has the other core, it is attention that gateway and client take theirs from.
        passed_on_s = self._calibration.passed_on_s(work.samples) if self._lanes != "local" else 0.0
        return StepTimes(
            layers_s + shared_s + passed_on_s,
            sum(half.core_s for half in halves) + shared_s,
            tuple(map(sum, zip(*(half.attention_s for half in halves), strict=True))),
            sum(half.lane_s for half in halves),
            len(halves),
        )

    def _layers_s(self, halves: Sequence[_Half]) -> float:
        if self._lanes == "local":
            return halves[0].dense_s + halves[0].slowest_s + halves[0].lane_s
        if len(halves) == 1:
            return halves[0].alone_s
        first, second = halves
        lane_s = max(first.lane_s, second.lane_s)
        return staggered_step_s(first.dense_s, second.dense_s, first.slowest_s, second.slowest_s, lane_s)

    def _half(self, work: Work) -> _Half:
        costs, cost = self._calibration, self._cost
        asked = max(work.queries)
        attention_s = tuple(self._attention_s(work, worker) for worker in range(self.workers))
        told = [queries or appended for queries, appended in zip(work.queries, work.appended, strict=True)]
        merge_s = costs.merge_s(work.tokens) if asked and work.chunk_tokens else 0.0
        return _Half(
            costs.body_s(work.tokens) + merge_s,
            sum(costs.own_s(tokens) for tokens in work.chunk_tokens),
            attention_s,
            max(sum(attention_s[core :: self._attention_cores]) for core in range(self._attention_cores)),
            sum(cost.sent_s(rows) for rows in told if rows),
            cost.lane_s(asked) if asked else 0.0,
            costs.turns_s(asked) if asked and self._shares_core else 0.0,
        )

    def _attention_s(self, work: Work, worker: int) -> float:
        chunks = [(rows, cached) for place, rows, cached in work.chunks if place == worker]
        sequences = work.queries[worker] - sum(rows for rows, cached in chunks if cached)
        seconds = self._cost.rows_s(sequences, work.read_tokens[worker]) if sequences else 0.0
        return seconds + sum(self._cost.chunk_s(rows, cached) for rows, cached in chunks)
