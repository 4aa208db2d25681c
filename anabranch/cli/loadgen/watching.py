"""What a run shows while it goes on: a line that changes or, where nobody looks, one now and then."""

from __future__ import annotations

from rich.console import Console
from rich.status import Status

from anabranch.cli.pulse import PULSE_S
from cluster.clock import monotonic
from loadgen.live import LiveFigures
from loadgen.pool import StageCourse
from loadgen.records import Record
from loadgen.simulation.simulation import Course


class LiveLine:
    """A `Watcher` that tells `console` how things stand, at most every so often where that is no terminal."""

    def __init__(self, console: Console, status: Status) -> None:
        self._console = console
        self._status = status
        self._figures = LiveFigures()
        self._told_s = monotonic() - PULSE_S

    def heard(self, record: Record) -> None:
        """See `Watcher`."""
        self._figures.heard(record)

    def looked(self, course: StageCourse, now_s: float) -> None:
        """See `Watcher`."""
        line = self._figures.line(course, now_s)
        if self._console.is_terminal:
            self._status.update(line)
        elif monotonic() - self._told_s >= PULSE_S:
            self._told_s = monotonic()
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class SimulationLine:
    """Says how a simulation stands, and ends it when told to."""

    def __init__(self, console: Console, status: Status) -> None:
        self._console = console
        self._status = status
        self._told_s = monotonic()
        self.is_stopped = False

    def stop(self) -> None:
        """The simulation ends with what it has."""
        self.is_stopped = True

    def goes_on(self, course: Course) -> bool:
        """Called by the simulation now and then."""
        now_s = monotonic()
        if now_s - self._told_s >= PULSE_S:
            self._told_s = now_s
            line = (
                f"{course.stage.name}: {course.now_s:,.0f} s simulated, sent {course.sent:,} of "
                f"{course.stage.requests:,}, under way {course.under_way:,}"
            )
            if self._console.is_terminal:
                self._status.update(line)
            else:
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        return not self.is_stopped
