"""Clusters of a sweep that are there, or are started for it: real requests, each point a run of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from cluster.errors import Unavailable
from loadgen.drivers.interface import Target
from loadgen.measurement import Measurement, Settings
from loadgen.metrics import Summary
from loadgen.scenario import Scenario
from loadgen.sweep.space import named
from loadgen.sweep.sweep import Measure, Subject


def measured(
    cluster: str,
    settings: Mapping[str, Any],
    reached: Callable[[], AbstractContextManager[Target]],
    how: Settings,
    run: Callable[[Measurement], list[Summary]],
) -> Subject:
    """A subject. `reached` gives a target that serves while it is entered; `run` does a measurement."""

    @contextmanager
    def opened() -> Iterator[Measure]:
        with reached() as target:

            def measure(scenario: Scenario) -> Summary:
                summaries = run(Measurement(scenario, target, how))
                if not summaries:
                    raise Unavailable("it was stopped before the first request")
                return summaries[0]

            yield measure

    return Subject(named(cluster, settings), cluster, settings, opened)
