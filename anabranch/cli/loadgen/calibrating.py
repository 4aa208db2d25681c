"""What the simulator may know of a cluster on this machine that is up and idle: the parts of its steps, each
measured by itself, and what telling its users of tokens takes of the cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from rich.console import Console

from anabranch.cli.bench.children import processor_s
from anabranch.cli.bench.others import processes_of, thread_seconds
from loadgen.metrics import Summary
from loadgen.scenario import Scenario
from loadgen.simulation.calibration import Calibration, Points
from loadgen.simulation.simulation import SimulatedCluster

WARM_UP = Scenario(concurrency=(4,), requests=8, prompt="300", output="8")
"""First calls compile, touch memory, and tell dense workers what their steps take."""
_TOLD = (
    Scenario(concurrency=(1,), requests=4, prompt="32", output="64"),
    Scenario(concurrency=(16,), requests=32, prompt="32", output="64"),
)

Measured: TypeAlias = Callable[[Scenario], Summary]
"""Puts a scenario of one stage and one sender on the cluster."""


@dataclass(frozen=True, slots=True)
class Telling:
    """See `Calibration`."""

    served: Points
    passed_on: Points


def telling(measured: Measured, dense_workers: int) -> Telling:
    """What one user and many take of a cluster that this process has started, beside its steps. Dense workers
    are taken to have equally many.
    """
    told = [_told(measured, scenario, dense_workers) for scenario in _TOLD]
    return Telling([(n, s) for n, s, _ in told], [(n, s) for n, _, s in told])


def calibrated(
    simulated: SimulatedCluster, folder: Path, dtype: str, told: Telling, console: Console
) -> Calibration:
    """What a simulation of this cluster needs, while the real one is idle: some minute."""
    from anabranch.cli.bench.calibration import measure

    console.print("measuring dense work, attention and lanes, each by itself", style="dim")
    found = measure(folder, dtype, [simulated.lanes], shares_core=simulated.shared_cores > 0)
    return replace(found, served=told.served, passed_on=told.passed_on)


def _told(measured: Measured, scenario: Scenario, dense_workers: int) -> tuple[int, float, float]:
    """(tokens a step; seconds that a dense worker computes beside it; that gateway and client do)."""
    served_s, passed_on_s = _spent_s()
    summary = measured(scenario)
    later_served_s, later_passed_on_s = _spent_s()
    tokens = max(1, scenario.concurrency[0] // dense_workers)
    steps = summary["total_output_tokens"] / tokens
    client_s = summary["client_cpu_share"] * summary["duration"]
    return (
        tokens,
        (later_served_s - served_s) / steps,
        (later_passed_on_s - passed_on_s + client_s) / steps,
    )


def _spent_s() -> tuple[float, float]:
    """By dense workers beside their engines, which compute most by far; by gateways."""
    served_s = 0.0
    for process in processes_of("workers.dense"):
        threads = thread_seconds(process)
        served_s += sum(threads) - max(threads)
    return served_s, sum(processor_s(process) for process in processes_of("workers.gateway"))
