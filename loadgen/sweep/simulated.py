"""Clusters of a sweep that are modelled: nothing is started, and the same seed gives the same figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from loadgen.metrics import Objectives, Summary
from loadgen.scenario import Scenario
from loadgen.simulation.machines import Shape
from loadgen.simulation.simulation import Course, SimulatedCluster, Simulation
from loadgen.sweep.space import named
from loadgen.sweep.sweep import Measure, Subject


def simulated(
    shape: Shape,
    settings: Mapping[str, Any],
    built: Callable[[Shape, Mapping[str, Any]], SimulatedCluster],
    objectives: Objectives,
    timeout_s: float,
    goes_on: Callable[[Course], bool],
) -> Subject:
    """A subject. `built` may refuse the shape or the settings; `goes_on` is asked now and then."""

    @contextmanager
    def opened() -> Iterator[Measure]:
        cluster = built(shape, settings)

        def measure(scenario: Scenario) -> Summary:
            simulation = Simulation(cluster, scenario, timeout_s)
            (summary,) = simulation.run(lambda _: None, goes_on, objectives)
            return summary

        yield measure

    return Subject(named(str(shape), settings), str(shape), settings, opened)
