"""Cores that do not halt while something is measured.

A virtual machine's core that has nothing to do is given back to the host, and what wakes it waits until the
host has a place for it again: on a busy host more than a message between two processes takes, and different
from minute to minute. Work of the idle class keeps the cores; everything else takes them from it at once.
Linux schedules sessions against each other first (`sched_autogroup_enabled`), and classes only within one:
this work is a session of its own, of the least weight, or it would take a third of what a cluster gets.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

_SPIN = """
import os, sys, time
core, parent = map(int, sys.argv[1:])
os.sched_setaffinity(0, {core})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
is_last = not os.path.exists("/proc/self/autogroup")
while not is_last and os.getppid() == parent:
    try:
        with open("/proc/self/autogroup", "w") as session:
            session.write("19")
        is_last = True
    except BlockingIOError:  # one change in a tenth of a second, for who is not root
        time.sleep(0.15)
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Until the end, or that of this process. Where the system knows no idle class, cores may halt."""
    cores = os.sched_getaffinity(0) if hasattr(os, "SCHED_IDLE") else ()
    spinning = [
        subprocess.Popen([sys.executable, "-c", _SPIN, str(core), str(os.getpid())], start_new_session=True)
        for core in cores
    ]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()
