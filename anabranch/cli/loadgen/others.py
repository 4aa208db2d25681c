"""How much of this machine others take while something is measured: what makes a run doubtful."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.clock import monotonic

_STAT = Path("/proc/stat")


@dataclass(slots=True)
class Others:
    """The share of all cores that processes took which this one did not start, or other machines of the same
    host: what a virtual core was kept from, it was kept from by somebody.
    """

    share: float = field(default=0.0)


@contextlib.contextmanager
def watched() -> Iterator[Others]:
    """Look before and after; the share is known at the end."""
    others = Others()
    began_s, busy_before, ours_before = monotonic(), busy_s(_STAT.read_text()), _ours_s()
    yield others
    spent_s = (busy_s(_STAT.read_text()) - busy_before) - (_ours_s() - ours_before)
    others.share = round(max(0.0, spent_s / ((monotonic() - began_s) * (os.cpu_count() or 1))), 3)


def busy_s(stat: str) -> float:
    """Of all cores, since the machine was started, by the text of /proc/stat; stolen time too."""
    ticks = [int(word) for word in stat.split("\n")[0].split()[1:9]]
    return (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")


def _ours_s() -> float:
    """Of this process and all it started, directly or not, those that have ended too."""
    parents: dict[int, int] = {}
    spent: dict[int, float] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = entry.read_text().rpartition(")")[2].split()
            process = int(entry.parent.name)
            parents[process] = int(words[1])
            spent[process] = sum(map(int, words[11:15])) / os.sysconf("SC_CLK_TCK")
    return sum(seconds for process, seconds in spent.items() if _is_ours(process, parents))


def _is_ours(process: int, parents: dict[int, int]) -> bool:
    while process > 1:
        if process == os.getpid():
            return True
        process = parents.get(process, 0)
    return False
