"""One seed, and what there is to say of it: runs in a process of its own."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback

from tests.sim.simulation import Simulation


def run_seed(seed: int, *, tells: bool) -> tuple[bool, int, str]:
    """Whether the seed holds, its events, and what there is to say: its story where it fails, or `tells`."""
    simulation, words = Simulation(seed), io.StringIO()
    holds = False
    with contextlib.redirect_stdout(words):
        try:
            simulation.run()
            holds = True
        except Exception:  # noqa: BLE001  the next seed may tell more
            print(f"seed {seed} fails: {simulation.shape}")
            traceback.print_exc(file=sys.stdout)
        if tells or not holds:
            journal = simulation.world.journal
            print("\n".join(journal if tells else journal[-30:]))
    return holds, simulation.world.events, words.getvalue()
