"""Runs many seeds: `python -m tests.sim --seeds 0:2000`. Prints each that fails, with its story."""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import torch

from tests.sim.seed import run_seed

_EPILOG = """\
A seed draws the shape of a cluster, its requests, and what goes wrong. Equal seeds give equal runs: the
program starts itself again with PYTHONHASHSEED=0. Exit status: 0 when all seeds hold, 1 otherwise.

  python -m tests.sim --seeds 0:2000       # some seconds a seed
  python -m tests.sim --seeds 17 --story   # what happened in one of them
"""
_EACH = 50
"""Seeds between two lines of progress."""


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
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--seeds", default="0:200", metavar="FROM:TO", help="or one seed; default 0:200")
    parser.add_argument("--jobs", type=int, default=cores, help="processes; default: one a core")
    parser.add_argument("--story", action="store_true", help="print what happened")
    arguments = parser.parse_args()
    first, _, end = arguments.seeds.partition(":")
    seeds = range(int(first), int(end or int(first) + 1))
    began_s, failed, events = time.monotonic(), 0, 0
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        runs = [pool.submit(run_seed, seed, tells=arguments.story) for seed in seeds]
        for done, run in enumerate(as_completed(runs), start=1):
            holds, passed, words = run.result()
            failed += not holds
            events += passed
            print(words, end="", flush=True)
            if done % _EACH == 0:
                print(f"{done} of {len(seeds)} seeds, {failed} failed", file=sys.stderr, flush=True)
    seconds = time.monotonic() - began_s
    print(f"{len(seeds)} seeds, {events} events in {seconds:.1f} s; {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
