"""How much of a machine others take."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from anabranch.cli.bench.others import busy_s, processes_of, thread_seconds


def test_stolen_time_counts_as_busy() -> None:
    """What a host gave to other machines was taken from this one; idle and waiting for disks were not."""
    ticks = os.sysconf("SC_CLK_TCK")
    words = (1, 2, 4, 100, 200, 8, 16, 32, 0, 0)
    stat = "cpu  " + " ".join(str(word * ticks) for word in words) + "\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
    assert busy_s(stat) == pytest.approx(1 + 2 + 4 + 8 + 16 + 32)


def test_a_process_is_found_by_its_module_and_its_threads_by_what_they_compute() -> None:
    """Among those that this one has started, not by words elsewhere in a command line."""
    code = (
        "import sys, threading, time\n"
        "def work():\n"
        "    end = time.thread_time() + 0.3\n"
        "    while time.thread_time() < end: pass\n"
        "    print(flush=True); sys.stdin.read()\n"
        "threading.Thread(target=work).start()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "workers.of-this-test"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert list(processes_of("workers.of-this-test")) == [process.pid]
        assert not processes_of("workers.of-this")
        *_, most_s = sorted(thread_seconds(process.pid))
        assert most_s >= 0.25
        assert len(thread_seconds(process.pid)) == 2
        process.communicate()
