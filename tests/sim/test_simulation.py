"""The simulation itself: it repeats, it notices what it is there to notice, and its seeds hold."""

import subprocess
import sys

import pytest

from tests.sim.requests import Violation
from tests.sim.simulation import Simulation
from workers.attention.store import Store

SEEDS = "0:60"


def _story(seed: int) -> list[str]:
    simulation = Simulation(seed)
    simulation.run()
    return simulation.world.journal


def test_a_seed_repeats() -> None:
    """Two runs of a seed tell the same story."""
    assert _story(5) == _story(5)


def test_a_wrong_value_in_a_cache_is_noticed() -> None:
    """Cached values change under a running request: its next token is called wrong."""
    simulation = Simulation(3)
    before = simulation.world.check

    def spoil() -> None:
        before()
        for worker in simulation.attention.values():
            if worker.store.blocks_held():
                worker.arena.layer(0).value.add_(1.0)

    simulation.world.check = spoil
    with pytest.raises(Violation, match=r"token \d+ is \d+, not"):
        simulation.run()


def test_a_block_that_is_not_given_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that let no lease run out keep what nobody released."""
    monkeypatch.setattr(Store, "expire", lambda _store: ())
    monkeypatch.setattr(Store, "release", lambda *_arguments: 0)
    with pytest.raises(Violation, match="still held"):
        Simulation(3).run()


@pytest.mark.system
@pytest.mark.timeout(300)
def test_seeds_hold() -> None:
    """Whatever these seeds let go wrong: every request ends with its tokens, every block is free again."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sim", "--seeds", SEEDS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
