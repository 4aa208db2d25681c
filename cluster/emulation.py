"""How long the parts of a step would take on other devices, and waiting until they would be over.

The real work is done, by a small model; then whoever did it waits until its padding is over: the time that
`cluster.perfmodel` gives for the emulated devices, times the dilation. What took longer than its padding was
late: it distorts, so it is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.clock import Clock, monotonic
from cluster.emulation_settings import EmulatedDevice, EmulationConfig
from cluster.perfmodel import DeviceSpeed, ModelShape, dense_step_floor_s, read_floor_s
from cluster.telemetry import logger

_log = logger("emulation")

KEPT_TIME = "kept_time"
"""The event in which a role tells how many of its calls took longer than their padding."""


@dataclass(frozen=True, slots=True)
class EmulatedTimes:
    """Dilated seconds of one layer of the small model, which stands for several of the emulated one."""

    settings: EmulationConfig
    layers: int
    """Of the small model."""

    def dense_s(self, rows: int, own_scores: int) -> float:
        """Dense operators over so many rows, and chunks over themselves."""
        device = self.settings.dense
        seconds = dense_step_floor_s(self._model, rows, _speed(device), device.devices)
        seconds += self._score_flop * own_scores / (device.flops_per_s * device.devices)
        return self._per_layer(seconds)

    def attend_s(self, spans: Iterable[tuple[int, int]]) -> float:
        """Attention of (rows, cached tokens) pairs: cache is read once, whatever the rows of a chunk."""
        device = self.settings.attention or self.settings.dense
        bandwidth = device.bandwidth_bytes_per_s * device.devices
        flops = device.flops_per_s * device.devices
        seconds = 0.0
        for rows, tokens in spans:
            read_s = read_floor_s(tokens * self._model.kv_token_bytes, bandwidth)
            seconds += max(read_s, self._score_flop * rows * tokens / flops if rows > 1 else 0.0)
        return self._per_layer(seconds)

    def lane_s(self, asked_rows: Sequence[int]) -> float:
        """Queries of so many rows to each attention worker, and their outputs back, at the busiest network
        card.
        """
        if self.settings.attention is None or not asked_rows:
            return 0.0
        seconds = 2 * self._width * self._slowest(asked_rows)
        return self._per_layer(seconds + self._model.layers * self.settings.round_trip_s)

    def cache_s(self, appended_rows: Sequence[int], attend_s: float) -> float:
        """Keys and values of so many rows to each attention worker, as far as they hold a step up: beside
        attending, which takes `attend_s`, or before it.
        """
        if self.settings.attention is None or not appended_rows:
            return 0.0
        width = 2 * self._width / self._model.query_group
        seconds = self._per_layer(width * self._slowest(appended_rows))
        return max(0.0, seconds - attend_s) if self.settings.overlaps else seconds

    def slack_s(self, asked_rows: int) -> float:
        """By how much attending to so many rows may be late and delay nothing, since the dense worker waits
        for moments, not for so long: the way of the reply, or, where the cache is beside the weights, the
        dense work behind it.
        """
        return self.dense_s(1, 0) if self.settings.attention is None else self.lane_s([asked_rows]) / 2

    def _slowest(self, rows: Sequence[int]) -> float:
        """Seconds that a byte of each of these rows takes, by attention worker, at the busiest card."""
        attention, dense = self.settings.attention, self.settings.dense
        assert attention is not None, "there are lanes"
        slowest = max(
            sum(rows) / (dense.network_bytes_per_s * dense.devices), max(rows) / attention.network_bytes_per_s
        )
        return slowest / self.settings.network_share

    @property
    def _width(self) -> int:
        """Bytes of a row's queries over all layers."""
        return self._model.hidden_size * self._model.element_bytes * self._model.layers

    def _per_layer(self, seconds: float) -> float:
        return self.settings.dilation * seconds / self.layers

    @property
    def _score_flop(self) -> float:
        return 4.0 * self._model.hidden_size * self._model.layers

    @property
    def _model(self) -> ModelShape:
        model = self.settings.model
        return ModelShape(
            model.weight_bytes, model.element_bytes, model.layers, model.hidden_size, model.query_group
        )


class Padding:
    """Makes calls last as long as they should, and counts those that lasted longer by themselves."""

    def __init__(self, clock: Clock = monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self.calls = 0
        self.late = 0
        self._clock = clock
        self._sleep = sleep

    def until(self, due_s: float, grace_s: float = 0.0) -> None:
        """Wait for a moment; one that has passed was missed, unless what follows hides that: `grace_s`."""
        self.calls += 1
        left_s = due_s - self._clock()
        if left_s > 0:
            self._sleep(left_s)
        elif left_s < -grace_s:
            self.late += 1

    def tell(self, who: str) -> None:
        """Log how many calls were late."""
        if self.calls:
            share = self.late / self.calls
            _log.info(KEPT_TIME, part=who, calls=self.calls, late=self.late, late_share=round(share, 5))


def _speed(device: EmulatedDevice) -> DeviceSpeed:
    # Its memory plays no part in how long anything takes.
    return DeviceSpeed(device.flops_per_s, device.bandwidth_bytes_per_s, memory_bytes=1.0)
