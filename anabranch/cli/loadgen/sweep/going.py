"""Goes through a sweep: the grid or the search, a line for each point, the table and the page at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table

from anabranch.cli.generate import INTERRUPTED_STATUS
from anabranch.cli.loadgen.sweep.options import Wishes
from anabranch.cli.loadgen.table import WIDTH
from cluster.errors import InvalidRequest
from loadgen.report.page import render
from loadgen.report.sweep_page import best_table, ranked, sweep_page
from loadgen.results import PAGE
from loadgen.scenario import Scenario
from loadgen.sweep.load import Course, Point
from loadgen.sweep.results import SweepFolder
from loadgen.sweep.space import Choice, Dimension, grid
from loadgen.sweep.sweep import Subject, Sweep

_CLUSTER = "cluster"
_SHOWN = 12
"""Rows of the table at the end; the page has them all."""

Make: TypeAlias = Callable[[str, Mapping[str, Any]], Subject]
"""The subject of a cluster, by its name, that is set to something."""


def go_through(
    wishes: Wishes,
    scenario: Scenario,
    clusters: Sequence[str],
    make: Make,
    folder: SweepFolder,
    errors: Console,
    goes_on: Callable[[], bool],
) -> int:
    """The whole sweep; returns the exit status. Raises InvalidRequest where nothing could be measured."""

    said: list[Point] = []

    def keep(point: Point) -> None:
        folder.add(point)
        if not said:
            for note in point.summary["notes"]:
                errors.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
            said.append(point)
        errors.print(_line(point), markup=False, highlight=False, soft_wrap=True)

    sweep = Sweep(scenario, wishes.loads, wishes.standard, keep, goes_on)

    def course(drawn: Mapping[str, Any]) -> Course:
        settings = {key: value for key, value in drawn.items() if key != _CLUSTER}
        found = sweep.run(make(drawn.get(_CLUSTER, clusters[0]), settings))
        if found.problem:
            errors.print(f"{found.subject}: {found.problem}", markup=False, highlight=False, soft_wrap=True)
        return found

    courses = _courses(wishes, clusters, course, goes_on)
    if not any(found.points for found in courses):
        if not goes_on():
            return INTERRUPTED_STATUS
        raise InvalidRequest(next(found.problem for found in courses))
    _finish(wishes, courses, folder)
    return 0 if goes_on() else INTERRUPTED_STATUS


def _courses(
    wishes: Wishes,
    clusters: Sequence[str],
    course: Callable[[Mapping[str, Any]], Course],
    goes_on: Callable[[], bool],
) -> list[Course]:
    cluster = Choice(_CLUSTER, tuple(clusters))
    if wishes.trials is None:
        return [course(drawn) for drawn in grid((cluster, *wishes.dimensions)) if goes_on()]
    # Here, not above: Optuna is an extra.
    from loadgen.sweep.search import search

    as_configured = [course({_CLUSTER: name}) for name in clusters]
    space: tuple[Dimension, ...] = wishes.dimensions if len(clusters) == 1 else (cluster, *wishes.dimensions)
    found = search(space, course, trials=wishes.trials, seed=wishes.seed, goes_on=goes_on)
    return [*as_configured, *found]


def _finish(wishes: Wishes, courses: Sequence[Course], folder: SweepFolder) -> None:
    """Table and page."""
    console = Console()
    rows = best_table(ranked(courses))
    console.width = max(console.width, WIDTH + max(len(row[0]) for row in rows.rows[:_SHOWN]))
    table = Table(box=box.SIMPLE_HEAD)
    for place, name in enumerate(rows.head):
        is_wordy = place in (0, *rows.wordy)
        table.add_column(name, justify="left" if is_wordy else "right", no_wrap=is_wordy)
    for row in rows.rows[:_SHOWN]:
        table.add_row(*row)
    console.print(table)
    if wishes.trials is not None:
        console.print(_gained(courses), markup=False, highlight=False, soft_wrap=True)
    page = folder.path / PAGE
    content = sweep_page(courses, wishes.standard, is_search=wishes.trials is not None)
    page.write_text(render(content), encoding="utf-8")
    console.print(f"written to {folder.path}; look at {page}", markup=False, highlight=False, soft_wrap=True)


def _gained(courses: Sequence[Course]) -> str:
    """What the search found beyond the settings as they were."""
    best = ranked(courses)[0]
    before = max((course.worth for course in courses if not course.settings), default=0.0)
    if not best.settings or not best.worth:
        return "no settings were found that are better than those configured"
    gain = f"{best.worth / before - 1:+.1%} over" if before else "which bears what these did not:"
    return f"best: {best.subject}, {gain} the settings as configured"


def _line(point: Point) -> str:
    summary = point.summary
    share = summary["goodput_share"]
    parts = (
        f"{point.subject}, {point.load}: {f'not borne ({point.fault})' if point.fault else 'borne'}",
        f"{summary['output_throughput'] or 0.0:,.0f} tokens/s",
        f"TTFT p99 {_ms(summary['p99_ttft_ms'])}, TPOT {_ms(summary['mean_tpot_ms'])}",
        "" if share is None else f"{share:.1%} keep the objectives",
    )
    return "; ".join(filter(None, (", ".join(filter(None, parts)), point.warning)))


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f} ms"
