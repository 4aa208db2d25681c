"""Goes through clusters and loads, one point after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

from cluster.errors import AnabranchError, InvalidRequest
from loadgen.metrics import Summary
from loadgen.scenario import Scenario
from loadgen.sweep.load import Course, Load, LoadKind, Point, Standard
from loadgen.sweep.saturation import Saturation

Measure: TypeAlias = Callable[[Scenario], Summary]
"""Runs a scenario of one stage and sums it up."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A cluster that can be had: entered, it is there and can be measured; left, it is gone."""

    name: str
    """Unique in a sweep."""
    cluster: str
    """Its shape, or its address."""
    settings: Mapping[str, Any]
    opened: Callable[[], AbstractContextManager[Measure]]
    """Raises an error of cluster.errors where there can be no such cluster."""


@dataclass(frozen=True, slots=True)
class Loads:
    """Which loads are tried: those given, or, from the first of them on, what finds the highest borne."""

    kind: LoadKind
    values: tuple[float, ...]
    searches: bool = False
    precision: float = 0.05

    def __post_init__(self) -> None:
        if not self.values or min(self.values) <= 0:
            raise InvalidRequest(f"loads ({self.kind}) are numbers above 0")


class Sweep:
    """Measures subjects under loads. `keep` is given each point as it ends; `goes_on` is asked after each."""

    def __init__(
        self,
        scenario: Scenario,
        loads: Loads,
        standard: Standard,
        keep: Callable[[Point], None],
        goes_on: Callable[[], bool],
    ) -> None:
        self._scenario = scenario
        self._loads = loads
        self._standard = standard
        self._keep = keep
        self._goes_on = goes_on

    def run(self, subject: Subject) -> Course:
        """All loads on a subject. What cannot be, or fails, is told in the course, since others may do."""
        points: list[Point] = []
        problem = ""
        try:
            with subject.opened() as measure:
                for point in self._points(subject, measure):
                    points.append(point)
                    self._keep(point)
        except AnabranchError as error:
            problem = error.message
        if self._loads.searches and points and not self._standard.is_sent(points[-1].summary):
            problem = "the senders were the limit, not the cluster, which may bear more: give more --senders"
        return Course(subject.name, subject.cluster, subject.settings, tuple(points), problem)

    def _points(self, subject: Subject, measure: Measure) -> Iterator[Point]:
        loads = self._loads
        if not loads.searches:
            for value in loads.values:
                if (point := self._point(subject, measure, value, None)) is None:
                    return
                yield point
            return
        search = Saturation(loads.values[0], loads.precision, loads.kind is LoadKind.CONCURRENCY)
        borne: Point | None = None
        while (wanted := search.next()) is not None:
            if (point := self._point(subject, measure, wanted, borne)) is None:
                return
            search.told(wanted, is_borne=point.is_kept)
            borne = point if point.is_kept else borne
            yield point
            if not self._standard.is_sent(point.summary):
                return

    def _point(self, subject: Subject, measure: Measure, value: float, lower: Point | None) -> Point | None:
        """None where the sweep was told to stop: what was measured until then is no point."""
        if not self._goes_on():
            return None
        load, standard = Load(self._loads.kind, value), self._standard
        summary = measure(load.of(self._scenario))
        if not self._goes_on():
            return None
        fault = standard.fault(load, summary, lower.summary if lower else None)
        key = standard.key(summary)
        if key not in summary:
            raise InvalidRequest(f"--maximise {key}: a summary has no such figure; `report` lists them")
        worth = 0.0 if fault else float(summary[key] or 0.0)
        return Point(
            subject.name,
            subject.cluster,
            subject.settings,
            load,
            fault,
            worth,
            {**summary, "stage": str(load)},
        )
