"""Which attention workers hold anything of which sequence, under which generation."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from cluster.types import Epoch, Generation, SequenceKey, WorkerId


@dataclass(frozen=True, slots=True)
class Held:
    """What one worker holds of one sequence."""

    worker: WorkerId
    epoch: Epoch
    generation: Generation
    is_granted: bool = True
    """False while the worker has not answered."""


class Holders:
    """Written as reservations succeed, so that what was reserved is also released or renewed. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[SequenceKey, dict[WorkerId, Held]] = {}

    def put(self, key: SequenceKey, held: Held) -> None:
        """A reservation or adoption succeeded."""
        with self._lock:
            self._held.setdefault(key, {})[held.worker] = held

    def expect(self, key: SequenceKey, expected: Held) -> Held:
        """Something is asked for at a life of a worker, and a release has to reach it there. What it holds
        already, or else `expected`: not renewed before it is granted, for the worker may not know it yet.
        """
        with self._lock:
            workers = self._held.setdefault(key, {})
            held = workers.get(expected.worker)
            if held is None or held.epoch != expected.epoch:
                held = workers[expected.worker] = replace(expected, is_granted=False)
            return held

    def granted(self, key: SequenceKey, held: Held) -> None:
        """What was expected came; nothing where it was given up meanwhile."""
        with self._lock:
            if self._held.get(key, {}).get(held.worker) == replace(held, is_granted=False):
                self._held[key][held.worker] = held

    def get(self, key: SequenceKey, worker: WorkerId) -> Held | None:
        """What a worker holds of a sequence."""
        with self._lock:
            return self._held.get(key, {}).get(worker)

    def take(self, key: SequenceKey) -> tuple[Held, ...]:
        """Forget a sequence; returns what is held of it."""
        with self._lock:
            return tuple(self._held.pop(key, {}).values())

    def take_one(self, key: SequenceKey, worker: WorkerId) -> Held | None:
        """Forget what one worker holds of a sequence; returns it."""
        with self._lock:
            return self._take(key, worker)

    def take_void(self, key: SequenceKey, worker: WorkerId, void: Generation) -> Held | None:
        """The same of what it holds under this generation or a lower one."""
        with self._lock:
            held = self._held.get(key, {}).get(worker)
            return self._take(key, worker) if held is not None and held.generation <= void else None

    def of_worker(self, worker: WorkerId, epoch: Epoch) -> dict[SequenceKey, Generation]:
        """The sequences of which this life of a worker holds something."""
        with self._lock:
            return {key: held.generation for key, held in self._at(worker, epoch) if held.is_granted}

    def forget_life(self, worker: WorkerId, epoch: Epoch) -> None:
        """A life of a worker is over, and what it held with it."""
        with self._lock:
            for key, _ in self._at(worker, epoch):
                self._take(key, worker)

    def _at(self, worker: WorkerId, epoch: Epoch) -> list[tuple[SequenceKey, Held]]:
        found = [(key, workers[worker]) for key, workers in self._held.items() if worker in workers]
        return [(key, held) for key, held in found if held.epoch == epoch]

    def _take(self, key: SequenceKey, worker: WorkerId) -> Held | None:
        held = self._held.get(key, {}).pop(worker, None)
        if not self._held.get(key):
            self._held.pop(key, None)
        return held
