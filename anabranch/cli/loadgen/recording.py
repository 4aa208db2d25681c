"""A measurement with all that goes with it: watched, written down, and stopped by a signal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.status import Status

from anabranch.cli.loadgen.reporting import write_page
from anabranch.cli.loadgen.watching import LiveLine
from cluster.clock import monotonic
from cluster.signals import Interrupts
from loadgen.drivers.interface import Target
from loadgen.measurement import Measurement
from loadgen.members import MemberWatch
from loadgen.metrics import Summary
from loadgen.pool import StopSwitch, Watcher
from loadgen.results import ResultsFolder

_ECHO_S = 1.0


@dataclass(frozen=True, slots=True)
class Recorder:
    """Where a run is shown, and what ends it."""

    console: Console
    status: Status
    stop: StopSwitch

    def measure(self, measurement: Measurement, folder: Path) -> list[Summary]:
        """Run it into a new folder, its page included."""
        with ResultsFolder(folder) as results:
            with _watching(LiveLine(self.console, self.status), measurement.target, results) as watcher:
                summaries = measurement.run(watcher, self.stop, results.add)
            results.sum_up(summaries)
        write_page(folder)
        return summaries


@contextlib.contextmanager
def _watching(watcher: Watcher, target: Target, results: ResultsFolder) -> Iterator[Watcher]:
    """The same watcher and, where there is a cluster to ask, samples of its members for the results."""
    if target.url:
        yield watcher
        return
    with contextlib.closing(MemberWatch.over(watcher, target, results.add_sample)) as both:
        yield both


def stopping(stop: StopSwitch) -> Interrupts:
    """Signals end the run with its report; a later one ends the process, unless it is an echo of the first:
    `timeout`, for one, sends its signal to the process and then to its group.
    """
    asked_s: list[float] = []

    def ask() -> None:
        asked_s.append(monotonic())
        stop.set()

    def insist(number: int) -> None:
        if monotonic() - asked_s[0] > _ECHO_S:
            os._exit(128 + number)

    return Interrupts(ask, insist)
