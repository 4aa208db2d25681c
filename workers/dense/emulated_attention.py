"""Attention of one step on emulated devices: dense work and lanes last as long as theirs would."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

from torch import Tensor

from cluster.config import Config
from cluster.emulation import EmulatedTimes, Padding
from workers.dense.remote_attention import AttentionTimes, StepAttention


class DensePace:
    """The dense device of this process: it computes on one thread, so whatever happened last on it is when
    the work that is to be padded began. What lies between two steps (head, sampling, planning) counts as the
    beginning of the second: the emulated device's step is all of its time.
    """

    def __init__(self, times: EmulatedTimes, dense_workers: int = 1) -> None:
        """`dense_workers`: of the cluster, which share its attention workers."""
        self.times = times
        self.others = dense_workers - 1
        self.padding = Padding()
        self.began_s = 0.0
        self.worked_s = 0.0
        """When dense work, of either micro-batch, was last over."""
        self._rests = True
        self.attended_s = 0.0
        """When the slowest attention worker is done with what it was given."""

    @classmethod
    def of(cls, config: Config, layers: int) -> DensePace | None:
        """Of the device that a configuration emulates; `layers` of the model that is computed."""
        if config.emulation is None:
            return None
        return cls(EmulatedTimes(config.emulation, layers), config.dense.replicas)

    def begin(self) -> None:
        """The device turns to something."""
        self.began_s = monotonic()

    def begin_step(self) -> None:
        """To a step: from where the last one's layers ended, unless there was nothing to do in between."""
        if self._rests:
            self._rests = False
            self.begin()

    def rest(self) -> None:
        """There is nothing to do."""
        self._rests = True


class EmulatedAttention:
    """`AttentionPort` around another one.

        segment of a layer ... send_query: wait until dense work would be over
        receive: wait until the reply would be here: lane, attending behind what was asked before, lane

    Attending is padded where it happens. What comes later by itself is not padded again, and counted as late,
    unless the worker may have been busy with as much of each other dense worker, or this one was with dense
    work of its other micro-batch: taking the reply is then part of the dense work behind.
    """

    def __init__(self, inner: StepAttention, pace: DensePace, chunk_sizes: Sequence[int]) -> None:
        """`chunk_sizes`: rows of each sequence, which attend to each other."""
        self._inner = inner
        self._pace = pace
        self._is_local = pace.times.settings.attention is None
        own_scores = sum(size * (size + 1) // 2 for size in chunk_sizes if size > 1)
        self._dense_s = pace.times.dense_s(sum(chunk_sizes), own_scores)
        asked = inner.asked
        self._attend_s = max(map(pace.times.attend_s, asked), default=0.0)
        lane_s = pace.times.lane_s([sum(rows for rows, _ in spans) for spans in asked])
        self._lane_s = lane_s + pace.times.cache_s(inner.appended, self._attend_s)
        self._due_s = 0.0

    @property
    def times(self) -> AttentionTimes:
        """Of the padded step."""
        return self._inner.times

    def send_query(self, layer: int, query: Tensor) -> None:
        """See `AttentionPort`."""
        self._pace.padding.until(self._pace.began_s + self._dense_s)
        self._pace.worked_s = monotonic()
        there_s = self._pace.worked_s + self._lane_s / 2
        self._pace.attended_s = max(there_s, self._pace.attended_s) + self._attend_s
        self._due_s = self._pace.attended_s + self._lane_s / 2
        self._inner.send_query(layer, query)

    def send_key_value(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See `AttentionPort`."""
        self._inner.send_key_value(layer, key, value)
        self._pace.begin()

    def receive(self, layer: int) -> Tensor:
        """See `AttentionPort`."""
        attended = self._inner.receive(layer)
        began_s = monotonic()
        is_overdue = self._pace.worked_s > self._due_s
        if self._due_s > began_s or not (self._is_local or is_overdue):
            self._pace.padding.until(self._due_s, grace_s=self._pace.others * self._attend_s)
            waited_s = monotonic() - began_s
            self._inner.times.lane_s += waited_s
            self._inner.times.waited_s += waited_s
        if self._is_local:
            # It is the same device: the dense work behind makes up for what was late.
            self._pace.began_s = self._due_s
        elif is_overdue:
            self._pace.began_s = self._pace.worked_s
        else:
            self._pace.begin()
        return attended
