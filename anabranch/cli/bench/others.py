"""How much of this machine others take while something is measured: what makes a run doubtful."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from cluster.clock import monotonic

_STAT = Path("/proc/stat")
_WALKED_BYTES = 2**29
_PIECE_BYTES = 2**22
_EVERY_S = 0.25


@dataclass(slots=True)
class Others:
    """What others take: known when the watch is over."""

    share: float = 0.0
    """Of all cores, what processes took which this one did not start, or other machines of the same host:
    what a virtual core was kept from, it was kept from by somebody.
    """

    read_bytes_per_s: float = 0.0
    """What memory gave one core now and then: other machines of a host take of that too, which no clock
    tells.
    """


@contextlib.contextmanager
def watched() -> Iterator[Others]:
    """Look before and after, and read a little memory (0.2 % of a core) all the time."""
    others, probe = Others(), _Probe()
    began_s, busy_before, ours_before = monotonic(), busy_s(_STAT.read_text()), _ours_s()
    with probe:
        yield others
    spent_s = (busy_s(_STAT.read_text()) - busy_before) - (_ours_s() - ours_before)
    others.share = round(max(0.0, spent_s / ((monotonic() - began_s) * (os.cpu_count() or 1))), 3)
    others.read_bytes_per_s = round(probe.read_bytes_per_s)


class _Probe(threading.Thread):
    """Reads the next piece of more memory than caches hold, at intervals."""

    def __init__(self) -> None:
        super().__init__(name="memory-probe", daemon=True)
        self._pieces = np.ones((_WALKED_BYTES // _PIECE_BYTES, _PIECE_BYTES // 4), dtype=np.float32)
        self._seconds: list[float] = []
        self._is_over = threading.Event()

    @property
    def read_bytes_per_s(self) -> float:
        """The median: a piece in whose middle the thread was kept from its core says nothing."""
        return _PIECE_BYTES / median(self._seconds)

    def run(self) -> None:
        """Until the watch is over; one piece at least."""
        while True:
            piece = self._pieces[len(self._seconds) % len(self._pieces)]
            began_s = monotonic()
            piece.sum()
            self._seconds.append(monotonic() - began_s)
            if self._is_over.wait(_EVERY_S):
                return

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_exception: object) -> None:
        self._is_over.set()
        self.join()


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
