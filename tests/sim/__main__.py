"""Runs many seeds: `python -m tests.sim --seeds 0:2000`. Prints each that fails, with its story."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback

from tests.sim.simulation import Simulation

_EPILOG = """\
A seed draws the shape of a cluster, its requests, and what goes wrong. Equal seeds give equal runs: the
program starts itself again with PYTHONHASHSEED=0. Exit status: 0 when all seeds hold, 1 otherwise.

  python -m tests.sim --seeds 0:2000       # some minutes
  python -m tests.sim --seeds 17 --story   # what happened in one of them
"""


def main() -> int:
    """Run the seeds asked for."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]])
    parser = argparse.ArgumentParser(
        prog="python -m tests.sim",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", default="0:200", metavar="FROM:TO", help="or one seed; default 0:200")
    parser.add_argument("--story", action="store_true", help="print what happened")
    arguments = parser.parse_args()
    first, _, end = arguments.seeds.partition(":")
    seeds = range(int(first), int(end or int(first) + 1))
    began_s, failed, events = time.monotonic(), 0, 0
    for done, seed in enumerate(seeds):
        if done and done % 10 == 0:
            print(f"{done} of {len(seeds)} seeds, {failed} failed", file=sys.stderr, flush=True)
        simulation = Simulation(seed)
        try:
            simulation.run()
        except Exception:  # noqa: BLE001  the next seed may tell more
            failed += 1
            print(f"seed {seed} fails: {simulation.shape}")
            traceback.print_exc(file=sys.stdout)
            print("\n".join(simulation.world.journal[-30:]), flush=True)
        events += simulation.world.events
        if arguments.story:
            print("\n".join(simulation.world.journal))
    seconds = time.monotonic() - began_s
    print(f"{len(seeds)} seeds, {events} events in {seconds:.1f} s; {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
