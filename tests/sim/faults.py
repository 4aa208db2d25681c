"""What goes wrong, at random, while requests are open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.types import WorkerId
from tests.sim.world import Event

if TYPE_CHECKING:
    from tests.sim.simulation import Simulation

CONTROLLER = "controller"


class Faults:
    """One fault after the other, until the end."""

    def __init__(self, simulation: Simulation) -> None:
        self._sim = simulation
        self._world = simulation.world
        self._ended = False
        self._mean_pause_s = self._world.rng.choice((0.2, 0.5, 2.0))
        self._kinds = self._world.rng.sample(self._all(), self._world.rng.randint(2, 6))
        self._next()

    def end(self) -> None:
        """Peace. What is away comes back."""
        self._ended = True
        if not self._sim.controller.alive:
            self._sim.controller.begin()

    def _all(self) -> list[Event]:
        return [
            self._kill_attention,
            self._kill_dense,
            self._kill_gateway,
            self._cut_lane,
            self._cut_gateway,
            self._cut_controller,
            self._freeze_dense,
            self._freeze_attention,
            self._lose_controller,
            self._drain_attention,
            self._drain_dense,
            self._hand_over,
            self._move,
            self._abort,
        ]

    def _next(self) -> None:
        self._world.after(0.1 + self._world.rng.expovariate(1 / self._mean_pause_s), self._strike)

    def _strike(self) -> None:
        if self._ended:
            return
        kind = self._world.rng.choice(self._kinds)
        self._world.note(f"fault: {kind.__name__[1:]}")
        kind()
        self._next()

    def _away_s(self) -> float:
        return self._world.rng.choice((0.1, 0.5, 2.0))

    def _kill_attention(self) -> None:
        worker = self._world.rng.choice(list(self._sim.attention.values()))
        self._sim.kill_attention(worker, self._away_s())

    def _kill_dense(self) -> None:
        self._sim.kill_dense(self._world.rng.choice(list(self._sim.dense.values())), self._away_s())

    def _kill_gateway(self) -> None:
        gateway = self._world.rng.choice(list(self._sim.gateways.values()))
        if gateway.alive:
            self._sim.kill_gateway(gateway, self._away_s())

    def _cut_lane(self) -> None:
        dense = self._world.rng.choice(list(self._sim.dense))
        self._sim.network.cut(dense, self._world.rng.choice(list(self._sim.attention)), self._away_s())

    def _cut_gateway(self) -> None:
        gateway = self._world.rng.choice(list(self._sim.gateways))
        self._sim.network.cut(gateway, self._world.rng.choice(list(self._sim.dense)), self._away_s())

    def _cut_controller(self) -> None:
        name = self._world.rng.choice([*self._sim.dense, *self._sim.attention])
        self._sim.network.cut(name, CONTROLLER, self._away_s())

    def _freeze_dense(self) -> None:
        self._world.rng.choice(list(self._sim.dense.values())).freeze(self._away_s())

    def _freeze_attention(self) -> None:
        worker = self._world.rng.choice(list(self._sim.attention.values()))
        self._sim.freeze_attention(worker, self._world.rng.choice((0.1, 0.5, 2.0, 4.0)))

    def _lose_controller(self) -> None:
        controller = self._sim.controller
        if controller.alive:
            controller.end()
            self._world.after(self._away_s(), lambda: None if controller.alive else controller.begin())

    def _drain_attention(self) -> None:
        if len(self._sim.attention) > 1:
            worker = self._world.rng.choice(list(self._sim.attention.values()))
            if worker.answers and not worker.store.draining:
                self._sim.drain_attention(worker)

    def _drain_dense(self) -> None:
        self._sim.drain_dense(self._world.rng.choice(list(self._sim.dense.values())))

    def _hand_over(self) -> None:
        dense = self._world.rng.choice(list(self._sim.dense.values()))
        keys = [request.key for request in self._sim.living_requests()]
        if dense.alive and keys:
            target = self._world.rng.choice([None, *map(WorkerId, self._sim.dense)])
            dense.engine.hand_over(self._world.rng.sample(keys, 1), target, lambda _living: None)

    def _move(self) -> None:
        living = self._sim.living_requests()
        if not living or len(self._sim.attention) < 2:
            return
        source, target = self._world.rng.sample(list(self._sim.attention.values()), 2)
        tokens = self._world.rng.choice((None, 8, 20))
        key = self._world.rng.choice(living).key
        for dense in self._sim.dense.values():
            if dense.alive:
                dense.engine.move(key, source.worker, target.worker, tokens)

    def _abort(self) -> None:
        living = [request for request in self._sim.living_requests() if request.gateway is not None]
        if living and self._world.chance(0.3):
            request = self._world.rng.choice(living)
            if request.gateway is not None and request.gateway.alive:
                request.gateway.abort(request)
