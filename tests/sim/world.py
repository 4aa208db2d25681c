"""Virtual time: one queue of events, one random generator, and executors that run calls as events."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from cluster.types import Epoch

Event = Callable[[], None]


class World:
    """Runs events in order of time. `check` is called after each of them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.now_s = 1000.0
        self.events = 0
        self.check: Event = lambda: None
        self.journal: list[str] = []
        """What happened, for whoever looks for the cause of a failure."""
        self._queue: list[tuple[float, int, Event]] = []
        self._numbers = itertools.count()

    def clock(self) -> float:
        """Virtual seconds."""
        return self.now_s

    def note(self, text: str) -> None:
        """Write a line of the story."""
        self.journal.append(f"{self.now_s - 1000:9.4f} {text}")

    def chance(self, probability: float) -> bool:
        """True so often."""
        return self.rng.random() < probability

    def after(self, delay_s: float, event: Event) -> None:
        """Let something happen later."""
        heapq.heappush(self._queue, (self.now_s + delay_s, next(self._numbers), event))

    def every(self, interval_s: float, event: Event, lives: Callable[[], bool]) -> None:
        """Let something happen again and again, while it lives."""

        def again() -> None:
            if lives():
                event()
                self.after(interval_s, again)

        self.after(self.rng.uniform(0, interval_s), again)

    def latency(self) -> float:
        """How long a message takes: mostly milliseconds, now and then much longer."""
        return self.rng.expovariate(500) if self.rng.random() < 0.97 else self.rng.uniform(0.01, 0.6)

    def run(self, until: Callable[[], bool], limit_s: float) -> bool:
        """Go on until something holds; False when so many virtual seconds passed before."""
        end_s = self.now_s + limit_s
        while not until():
            if self._queue[0][0] > end_s:
                return False
            time_s, _, event = heapq.heappop(self._queue)
            self.now_s = max(self.now_s, time_s)
            event()
            self.events += 1
            self.check()
        return True


class Wire:
    """Delivers messages in order, each after some time, while both ends live."""

    def __init__(self, world: World, lives: Callable[[], bool]) -> None:
        self._world = world
        self._lives = lives
        self._free_s = 0.0

    def send(self, event: Event) -> None:
        """Let it happen at the other end."""
        self._free_s = max(self._free_s, self._world.now_s + self._world.latency())

        def arrive() -> None:
            if self._lives():
                event()

        self._world.after(self._free_s - self._world.now_s, arrive)


class SimulatedProcess:
    """One life of a process: it may stand still for a while, and ends once."""

    def __init__(self, world: World, name: str, epoch: Epoch) -> None:
        self.name, self.epoch = name, epoch
        self.alive = True
        self._world = world
        self._frozen_until_s = 0.0

    @property
    def life(self) -> str:
        """A name that no other life has."""
        return f"{self.name}@{self.epoch}"

    @property
    def answers(self) -> bool:
        """Whether it is alive and not frozen."""
        return self.alive and self._world.now_s >= self._frozen_until_s

    def freeze(self, seconds: float) -> None:
        """Nothing happens in it for so long; what reaches it meanwhile waits."""
        self._frozen_until_s = max(self._frozen_until_s, self._world.now_s + seconds)

    def when_awake(self, event: Event) -> None:
        """Let something happen in it: now, or when it goes on; never once it has ended."""
        if self.answers:
            event()
        elif self.alive:
            self._world.after(self._frozen_until_s - self._world.now_s, lambda: self.when_awake(event))


class SimulatedExecutor(Executor):
    """Runs calls as events while its process goes on: one after the other where it has one thread."""

    def __init__(self, world: World, threads: int, process: SimulatedProcess) -> None:
        self._wires = [Wire(world, lambda: process.alive) for _ in range(threads)]
        self._process = process
        self._world = world

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor`. Nobody reads the future."""
        self._world.rng.choice(self._wires).send(
            lambda: self._process.when_awake(lambda: fn(*args, **kwargs))
        )
        return Future()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """There is no thread to end."""
