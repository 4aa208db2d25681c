"""How much of this machine others take while something is measured: what makes a run doubtful."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.clock import monotonic

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Others:
    """What others take: known when the watch is over."""

    share: float = 0.0
    """Of all cores, what processes took which this one did not start, or other machines of the same host:
    what a virtual core was kept from, it was kept from by somebody.
    """


@contextlib.contextmanager
def watched() -> Iterator[Others]:
    """Look before and after."""
    others = Others()
    began_s, busy_before, ours_before = monotonic(), busy_s((_PROC / "stat").read_text()), _ours_s()
    yield others
    spent_s = (busy_s((_PROC / "stat").read_text()) - busy_before) - (_ours_s() - ours_before)
    others.share = round(max(0.0, spent_s / ((monotonic() - began_s) * (os.cpu_count() or 1))), 3)


def busy_s(stat: str) -> float:
    """Of all cores, since the machine was started, by the text of /proc/stat; stolen time too."""
    ticks = [int(word) for word in stat.split("\n")[0].split()[1:9]]
    return (sum(ticks) - sum(ticks[3:5])) / _TICKS_PER_S


def processes_of(module: str) -> Sequence[int]:
    """Ids of the processes that this one started, directly or not, to run `python -m module`."""
    parents = {process: parent for process, (parent, _) in _processes().items()}
    return [
        process
        for process in parents
        if _is_ours(process, parents) and module.encode() in _words(_PROC / str(process) / "cmdline")
    ]


def thread_seconds(process: int) -> Sequence[float]:
    """What each thread of a living process has computed so far."""
    found = []
    for entry in (_PROC / str(process) / "task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            found.append(_computed_s(_after_name(entry / "stat")[11:13]))
    return found


def _ours_s() -> float:
    """Of this process and all it started, directly or not, those that have ended too."""
    known = _processes()
    parents = {process: parent for process, (parent, _) in known.items()}
    return sum(seconds for process, (_, seconds) in known.items() if _is_ours(process, parents))


def _processes() -> dict[int, tuple[int, float]]:
    """By id: the parent's, and what it has computed, with its children that have ended."""
    found = {}
    for entry in _PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            words = _after_name(entry)
            found[int(entry.parent.name)] = int(words[1]), _computed_s(words[11:15])
    return found


def _after_name(stat: Path) -> Sequence[str]:
    return stat.read_text().rpartition(")")[2].split()


def _computed_s(ticks: Sequence[str]) -> float:
    return sum(map(int, ticks)) / _TICKS_PER_S


def _words(cmdline: Path) -> Sequence[bytes]:
    try:
        return cmdline.read_bytes().split(b"\0")
    except OSError:  # it has just ended
        return ()


def _is_ours(process: int, parents: dict[int, int]) -> bool:
    while process > 1:
        if process == os.getpid():
            return True
        process = parents.get(process, 0)
    return False
