"""Cores that do not halt while one measures."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from anabranch.cli.bench.awake import awake


def _of_the_idle_class(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if os.sched_getscheduler(int(child)) == os.SCHED_IDLE]


def _within(seconds: float, expected: int, parent: int) -> bool:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        if len(_of_the_idle_class(parent)) == expected:
            return True
        time.sleep(0.02)
    return False


def _lives(process: int) -> bool:
    """Whether it is there and has not ended, though nobody may have waited for it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_core_has_work_that_gives_way() -> None:
    """One process a core, each on its own and of the idle class, until the end."""
    with awake():
        assert _within(10.0, len(os.sched_getaffinity(0)), os.getpid())
        kept = [os.sched_getaffinity(child) for child in _of_the_idle_class(os.getpid())]
        assert sorted(map(sorted, kept)) == [[core] for core in sorted(os.sched_getaffinity(0))]
    assert not _of_the_idle_class(os.getpid())


def _processor_s(process: int) -> float:
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, words[11:13])) / os.sysconf("SC_CLK_TCK")


def test_another_session_gets_its_core() -> None:
    """What keeps a core awake takes next to nothing of it from work of whatever session."""
    core = min(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    with awake():
        assert _within(10.0, len(os.sched_getaffinity(0)), os.getpid())
        (keeper,) = (one for one in _of_the_idle_class(os.getpid()) if os.sched_getaffinity(one) == {core})
        with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as working:
            time.sleep(1.0)
            before = _processor_s(keeper), _processor_s(working.pid)
            time.sleep(3.0)
            kept_s, worked_s = (
                _processor_s(process) - start_s
                for process, start_s in zip((keeper, working.pid), before, strict=True)
            )
            working.kill()
    assert kept_s < 0.15 * worked_s


def test_nothing_stays_awake_for_the_dead() -> None:
    """Who is killed ends nobody: what kept the cores ends by itself."""
    code = "import os, time\nfrom anabranch.cli.bench.awake import awake\nwith awake(): time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code]) as measuring:
        assert _within(20.0, len(os.sched_getaffinity(0)), measuring.pid)
        spinning = _of_the_idle_class(measuring.pid)
        measuring.kill()
    end_s = time.monotonic() + 20.0
    while any(map(_lives, spinning)):
        assert time.monotonic() < end_s, "it spins for nobody"
        time.sleep(0.05)
