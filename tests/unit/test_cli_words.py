"""What the command line says while it waits, and how it names itself."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from anabranch.cli.awaited import Awaited, weights_loaded
from anabranch.cli.invocation import invocation
from anabranch.cli.live import SlotLines
from anabranch.cli.pulse import pulse
from controller.events import ClusterReady, Opened, SlotChanged, Stopping
from controller.slots import Phase, Slot
from controller.state import ClusterRecord

SLOT = Slot("dense-0", "dense", 0)
READY = ClusterReady(ClusterRecord(1, 1, "127.0.0.1:1", "model"))


def test_what_is_awaited_is_always_said(tmp_path: Path) -> None:
    """Ray, the processes that are not ready with the share of weights loaded, nothing while all is well,
    and at the end what still runs.
    """
    log = tmp_path / "dense-0.log"
    log.write_text('{"event": "loading_weights", "done_bytes": 40, "total_bytes": 100}\n')
    awaited = Awaited()
    assert awaited.words() == "starting Ray"
    awaited(Opened("127.0.0.1:1", 1))
    starting = replace(SLOT, phase=Phase.STARTING, log_file=str(log))
    awaited(SlotChanged(starting))
    assert awaited.words() == "dense-0 starting (40% of the weights loaded)"
    awaited(SlotChanged(replace(starting, phase=Phase.READY)))
    awaited(READY)
    assert awaited.words() == ""
    awaited(Stopping(10.0))
    awaited(SlotChanged(replace(starting, phase=Phase.ENDING)))
    assert awaited.words() == "dense-0 ending"
    awaited(SlotChanged(replace(starting, phase=Phase.STOPPED)))
    assert awaited.words() == "stopping Ray"


def test_the_share_of_weights_is_the_last_one_logged(tmp_path: Path) -> None:
    """In either format of the log; a log that is not here or says nothing of weights has none."""
    log = tmp_path / "log"
    log.write_text(
        "x loading_weights done_bytes=1 total_bytes=4\nx loading_weights done_bytes=3 total_bytes=4\n"
    )
    assert weights_loaded(log) == 0.75
    log.write_text("registered\n")
    assert weights_loaded(log) is None
    assert weights_loaded(tmp_path / "elsewhere") is None


def test_each_phase_and_each_problem_of_a_slot_is_told_once() -> None:
    """A process number that became known meanwhile is no news; a new problem is."""
    lines = SlotLines()
    starting = replace(SLOT, phase=Phase.STARTING)
    assert lines.line(starting) == "dense-0 starting"
    assert lines.line(replace(starting, process_id=7)) is None
    paused = replace(SLOT, phase=Phase.PAUSED, problem="ended by SIGKILL")
    assert lines.line(paused) == "dense-0 paused: ended by SIGKILL"
    assert lines.line(replace(paused, phase=Phase.STARTING)) == "dense-0 starting"
    assert lines.line(replace(paused, phase=Phase.STARTING, problem="gone")) == "dense-0 starting: gone"


def test_a_pulse_beats_until_it_is_left() -> None:
    """It says how long it has been, and nothing any more afterwards."""
    beats: list[float] = []
    three = threading.Event()

    def say(passed_s: float) -> None:
        beats.append(passed_s)
        if len(beats) == 3:
            three.set()

    with pulse(say, every_s=0.01):
        assert three.wait(10)
    assert beats == sorted(beats)
    assert not [thread for thread in threading.enumerate() if thread.name == "pulse"]


def test_the_next_command_is_named_as_the_shell_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name where it is on the PATH, else by its path from here, as a newcomer can type it."""
    program = tmp_path / ".venv" / "bin" / "anabranch"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program), "demo"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert invocation() == ".venv/bin/anabranch"
    monkeypatch.setenv("PATH", str(program.parent))
    assert invocation() == "anabranch"
    monkeypatch.setattr(sys, "argv", ["/somewhere/anabranch/cli/__main__.py", "demo"])
    assert invocation() == f"{sys.executable} -m anabranch.cli"
