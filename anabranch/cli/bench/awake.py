"""Cores that do not halt while something is measured.

A virtual machine's core that has nothing to do is given back to the host, and what wakes it waits until the
host has a place for it again: on a busy host more than a message between two processes takes, and different
from minute to minute. Work of the idle class keeps the cores; everything else takes them from it at once.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

_SPIN = """
import os, sys
core, parent = map(int, sys.argv[1:])
os.sched_setaffinity(0, {core})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Until the end, or that of this process. Where the system knows no idle class, cores may halt."""
    cores = os.sched_getaffinity(0) if hasattr(os, "SCHED_IDLE") else ()
    spinning = [
        subprocess.Popen([sys.executable, "-c", _SPIN, str(core), str(os.getpid())]) for core in cores
    ]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()
