"""What members of a simulated cluster would tell of themselves: the samples that a real run has of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from loadgen.members import EVERY_S, Sample
from loadgen.simulation.engine import SimulatedEngine
from loadgen.simulation.pool import Arena, ModelledPool
from loadgen.simulation.timeline import Timeline

_LOOKS_MOST = 3600
_HOST = "simulated hardware"


class SimulatedMembers:
    """Looks at each member once a second of the virtual clock; after an hour's looks half as often, and again
    after as many more, so that a run of any length has some thousands.
    """

    def __init__(self, timeline: Timeline, keep: Callable[[Sample], None]) -> None:
        self._timeline = timeline
        self._keep = keep
        self._every_s = EVERY_S
        self._looks = 0

    def look(self, engines: Sequence[SimulatedEngine], pool: ModelledPool) -> None:
        """Now and, as long as something else is to come, again and again."""
        own = {arena.home: arena for arena in pool.arenas if arena.is_local}
        for engine in engines:
            self._tell(f"dense-{engine.index}", "dense", own.get(engine.index), engine)
        for arena in pool.arenas if not own else ():
            self._tell(arena.worker, "attention", arena)
        self._looks += 1
        if self._looks % _LOOKS_MOST == 0:
            self._every_s *= 2
        if self._timeline.has_more:
            self._timeline.at(self._timeline.now_s + self._every_s, partial(self.look, engines, pool))

    def _tell(self, name: str, role: str, arena: Arena | None, engine: SimulatedEngine | None = None) -> None:
        self._keep(
            Sample(
                round(self._timeline.now_s, 3),
                name,
                role,
                _HOST,
                running=engine.running if engine else 0,
                waiting=engine.waiting if engine else 0,
                blocks=arena.capacity_blocks if arena else 0,
                blocks_used=arena.capacity_blocks - arena.free_blocks if arena else 0,
                blocks_cached=len(arena.shared.cached) if arena else 0,
            )
        )
