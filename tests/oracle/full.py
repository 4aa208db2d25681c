"""The full matrix of token equality: `python -m tests.oracle.full [--refresh]`, about 20 minutes on 2 cores.

Writes RESULTS.md beside this file and exits with 1 if anything differs. Cases run in processes of one
thread each, one per core; a case is a function of this folder and its arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from time import monotonic
from typing import Any

from tests.oracle import smollm2_part, tiny_parts
from tests.oracle.matrix import Tally
from tests.oracle.report import Part, commit_now, write
from tests.oracle.smollm2_references import prompts, reference

PARTS = {
    "real, free": "SmolLM2-135M, free-running, batch of all prompts",
    "real, forced": "SmolLM2-135M, teacher-forced, every position",
    "architectures": "architectures x rope x sharding x step x block",
    "batches": "batches of 1 to 16 with preemption",
    "sampled": "sampled: alone, in batches, sharded, preempted",
    "transports": "transports local, tcp, grpc",
}
_PROCESSES_MOST = 4
"""Each holds the real model twice, and a pool of its KV: 2 GB."""


@dataclass(frozen=True)
class Job:
    """Work of one process: `function(*arguments)` accounts for a piece of a part."""

    part: str
    title: str
    function: Callable[..., Tally]
    arguments: tuple[Any, ...]


def jobs() -> list[Job]:
    """Everything, the longest first."""
    indices = sorted(range(len(prompts())), key=lambda index: -len(prompts()[index]))
    found: list[Job] = []
    for part, function in (
        ("real, free", smollm2_part.free_running),
        ("real, forced", smollm2_part.teacher_forced),
    ):
        found += [Job(part, shape, function, (shape, indices)) for shape in smollm2_part.SHAPES]
    found += [
        Job("architectures", name, tiny_parts.architecture, (name,))
        for name in tiny_parts.architecture_rows()
    ]
    found += [Job("sampled", name, tiny_parts.sampled, (name,)) for name in tiny_parts.SAMPLINGS]
    found += [Job("batches", arena, tiny_parts.batches, (arena,)) for arena in tiny_parts.SMALL_ARENAS]
    found += [Job("transports", name, tiny_parts.transports, (name,)) for name in ("local", "tcp", "grpc")]
    return found


def run(pool: ProcessPoolExecutor, work: list[Job]) -> dict[str, Part]:
    """Run the jobs, print each one's outcome as it comes, and add them up by part."""
    began_s = monotonic()
    parts = {key: Part(title) for key, title in PARTS.items()}
    futures: dict[Future[Tally], Job] = {pool.submit(job.function, *job.arguments): job for job in work}
    for done, future in enumerate(as_completed(futures), 1):
        job = futures[future]
        tally = _outcome(future, job)
        parts[job.part].tally.add(tally)
        state = "ok" if not tally.problems else "FAILED"
        print(
            f"{monotonic() - began_s:6.0f} s  {done}/{len(work)}  {job.part}: {job.title}: "
            f"{tally.compared} of {tally.positions} positions, {state}",
            flush=True,
        )
        for problem in tally.problems:
            print(f"          {problem}", flush=True)
    return parts


def _outcome(future: Future[Tally], job: Job) -> Tally:
    """A job that breaks is a problem of its part; the others go on."""
    error = future.exception()
    if error is None:
        return future.result()
    return Tally(problems=[f"{job.title}: {type(error).__name__}: {error}"])


def refresh_references(pool: ProcessPoolExecutor, refresh: bool) -> None:
    """Let transformers decode what the cache lacks, the longest prompt first."""
    began_s = monotonic()
    for _ in pool.map(reference, sorted(prompts(), key=len, reverse=True), [refresh] * len(prompts())):
        pass
    print(f"{monotonic() - began_s:6.0f} s  references of {len(prompts())} prompts are there", flush=True)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--refresh", action="store_true", help="compute SmolLM2's reference tokens anew")
    refresh = parser.parse_args().refresh
    began_s, commit = monotonic(), commit_now()
    processes = min(os.cpu_count() or 1, _PROCESSES_MOST)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        refresh_references(pool, refresh)
        parts = run(pool, jobs())
    models = len(tiny_parts.architecture_rows())
    passed = write(list(parts.values()), commit, monotonic() - began_s, models)
    print("passed" if passed else "FAILED: see tests/oracle/RESULTS.md")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
