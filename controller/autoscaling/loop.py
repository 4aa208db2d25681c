"""Looks, decides, changes, and follows each change to its end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.clock import Clock, monotonic
from cluster.errors import AnabranchError
from cluster.policies.autoscaler import AutoscalerPolicy, Bounds, Change, Sample, Scaled, decide
from cluster.telemetry import logger
from controller.autoscaling.pool_watch import PoolWatch
from controller.autoscaling.workloads import Scale, Workloads

_log = logger("autoscaler")

_SAMPLES_MOST = 10_000


@dataclass(frozen=True, slots=True)
class Settings:
    """`bounds` names the roles that are scaled. `applies`: change, not only say what would be. `settle_s`:
    for how long a change is followed at most.
    """

    bounds: Mapping[Scaled, Bounds]
    policy: AutoscalerPolicy = field(default_factory=AutoscalerPolicy)
    interval_s: float = 10.0
    settle_s: float = 900.0
    applies: bool = False


class Autoscaler:
    """Owns the samples since the last change. One change at a time: while victims drain or newcomers load the
    model, the pool does not say what it needs.
    """

    def __init__(
        self, settings: Settings, pool: PoolWatch, workloads: Workloads, clock: Clock = monotonic
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._workloads = workloads
        self._clock = clock
        self._samples: deque[Sample] = deque(maxlen=_SAMPLES_MOST)
        self._changed_s: dict[Scaled, float] = {}
        self._said: dict[Scaled, int] = {}

    def run(self, stop: threading.Event) -> None:
        """Until told to stop. What fails is logged, and tried again with the next look."""
        while not stop.is_set():
            try:
                self.turn(stop)
            except AnabranchError as error:
                _log.warning("autoscaler_held_up", reason=error.reason, problem=error.message)
            stop.wait(self._settings.interval_s)

    def turn(self, stop: threading.Event) -> None:
        """One look, and what follows from it. Raises what the controller's and Kubernetes' answers become."""
        self._samples.append(self._pool.look())
        scales = {role: self._workloads.scale(role) for role in self._settings.bounds}
        counts = {role: scale.count for role, scale in scales.items()}
        changes = decide(self._samples, counts, self._settings.bounds, self._changed_s, self._settings.policy)
        if self._settings.applies:
            for change in changes[:1]:
                self._apply(change, scales[change.role], stop)
            return
        said, self._said = self._said, {change.role: change.count for change in changes}
        for change in changes:
            if said.get(change.role) != change.count:
                self._tell("would_resize", change, scales[change.role])

    def _apply(self, change: Change, seen: Scale, stop: threading.Event) -> None:
        victims = self._tell("resize", change, seen)
        if victims:
            self._pool.drain(victims, self._settings.settle_s, stop)
        self._workloads.resize(change.role, seen, change.count, victims)
        try:
            is_settled = self._workloads.await_settled(change.role, self._settings.settle_s, stop)
        finally:
            self._changed_s[change.role] = self._clock()
            self._samples.clear()  # of another pool
        event = "resized" if is_settled else "resize_unsettled"
        _log.info(event, role_resized=change.role, count=change.count)

    def _tell(self, event: str, change: Change, seen: Scale) -> list[str]:
        idle_first = self._pool.idle_first(change.role)
        victims = list(self._workloads.victims(change.role, seen, change.count, idle_first))
        _log.info(
            event,
            role_resized=change.role,
            was=seen.count,
            count=change.count,
            victims=victims,
            why=change.reason,
        )
        return victims
