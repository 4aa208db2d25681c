"""`anabranch up`, `status` and `down` as a user sees them: processes, a terminal, keys."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import config as configuration
from cluster.errors import NotFound
from controller.state import StateFolder, process_start
from tests.integration.clusters import DEADLINE_S, alive, descendants

pytestmark = pytest.mark.system  # many processes: minutes rather than seconds

_READY = re.compile(r"serving model: gRPC at 127\.0\.0\.1:\d+")


class Screen:
    """Collects what a program writes, and lets tests wait for it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._text = ""
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self._descriptor, 65536)
            except OSError:  # a terminal whose program has ended
                piece = b""
            with self._changed:
                self._text += piece.decode(errors="replace")
                self._changed.notify_all()
            if not piece:
                return

    @property
    def text(self) -> str:
        """Everything written so far."""
        with self._changed:
            return self._text

    def await_text(self, pattern: re.Pattern[str]) -> None:
        """Wait until the pattern was written."""
        with self._changed:
            found = self._changed.wait_for(lambda: pattern.search(self._text), DEADLINE_S)
            assert found, self._text

    def await_end(self) -> None:
        """Wait until nothing more can come."""
        self._reader.join(DEADLINE_S)


@contextmanager
def up_in_terminal(folder: Path, *settings: str) -> Iterator[tuple[subprocess.Popen[bytes], int, Screen]]:
    """`anabranch up` in a terminal of its own: process, keyboard, screen."""
    keyboard, terminal = pty.openpty()
    with up_program(folder, settings, terminal) as process:
        os.close(terminal)
        screen = Screen(keyboard)
        yield process, keyboard, screen
        process.kill()
        screen.await_end()
        os.close(keyboard)


@contextmanager
def up_program(folder: Path, settings: tuple[str, ...], output: int) -> Iterator[subprocess.Popen[bytes]]:
    """`anabranch up` with processes that only join."""
    command = [sys.executable, "-m", "tests.integration.up_program", str(folder), *settings]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
    with subprocess.Popen(
        command, stdin=output, stdout=output, stderr=output, start_new_session=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def up_in_pipe(folder: Path, *settings: str) -> Iterator[tuple[subprocess.Popen[bytes], Screen]]:
    """`anabranch up` whose output is no terminal."""
    reading, writing = os.pipe()
    with up_program(folder, settings, writing) as process:
        os.close(writing)
        screen = Screen(reading)
        yield process, screen
        process.kill()
        screen.await_end()
    os.close(reading)


def anabranch(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the command line."""
    command = [sys.executable, "-m", "anabranch.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def state_file(folder: Path) -> str:
    """A configuration that names only the state folder, for status and down."""
    file = folder / "state.yaml"
    file.write_text(f"state_dir: {folder / 'state'}\n")
    return str(file)


def test_ctrl_c_drains_and_leaves_nothing(tmp_path: Path) -> None:
    """The terminal shows every slot; Ctrl-C stops all processes in order and the status is 0."""
    with up_in_terminal(tmp_path) as (process, keyboard, screen):
        screen.await_text(_READY)
        screen.await_text(re.compile(r"attention-1.*ready"))
        processes = descendants(process.pid)
        os.write(keyboard, b"\x03")
        assert process.wait(DEADLINE_S) == 0
    assert alive(processes) == []
    assert "Traceback" not in screen.text


def test_sigterm_while_ray_starts_leaves_nothing(tmp_path: Path) -> None:
    """In the middle of Ray's start SIGTERM ends `up` as it does later: status 0, "stopped", and neither
    a process nor Ray's folder is left.
    """
    with up_in_pipe(tmp_path) as (process, screen):
        screen.await_text(re.compile("starting Ray"))
        await_program("gcs_server", process.pid)
        processes = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
        screen.await_end()
    assert screen.text.endswith("stopped\n")
    assert alive(processes) == []
    assert list(Path("/tmp").glob(f"anabranch-ray-*/r/session_*_{process.pid}")) == []


def await_program(name: str, process_id: int) -> None:
    """Wait until a program runs below a process."""
    end_s = time.monotonic() + DEADLINE_S
    while not any(name in command for command in commands(descendants(process_id))):
        assert time.monotonic() < end_s, f"{name} does not run"


def commands(processes: dict[int, str]) -> Iterator[str]:
    """Command lines of those that still run."""
    for number in processes:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield Path(f"/proc/{number}/cmdline").read_text()


def test_status_and_down_find_the_cluster(tmp_path: Path) -> None:
    """`status` shows slots and members, `--json` too; a second `up` is refused; `down` returns when
    nothing runs any more, and gateways are told its grace.
    """
    config = state_file(tmp_path)
    with up_in_pipe(tmp_path) as (process, screen):
        screen.await_text(_READY)
        assert "dense-0" in anabranch("status", "--config", config).stdout
        fleet = json.loads(anabranch("status", "--json", "--config", config).stdout)
        assert {slot["worker_id"] for slot in fleet["slots"]} == {
            member["worker_id"] for member in fleet["membership"]["members"]
        }
        with up_in_pipe(tmp_path) as (second, refusal):
            assert second.wait(DEADLINE_S) == 1
            refusal.await_end()
            assert re.search(
                r"^anabranch: a cluster runs already.*anabranch down", refusal.text, re.MULTILINE
            )
        processes = {process.pid: str(process_start(process.pid))} | descendants(process.pid)
        down = anabranch("down", "--grace", "45", "--config", config)
        assert (down.returncode, alive(processes)) == (0, [])
        assert grace_told(tmp_path, "gateway-0") in (44, 45)
        assert process.wait(DEADLINE_S) == 0
    gone = anabranch("status", "--config", config)
    assert gone.returncode == 1
    assert "anabranch up" in gone.stderr


def grace_told(folder: Path, worker: str) -> int:
    """Seconds in which a process was asked to leave, as it says; `configured` gives 5."""
    lines = (folder / "state/logs" / f"{worker}.log").read_text().splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    return int(next(event["grace_s"] for event in events if event["event"] == "draining"))


def test_drain_lets_one_worker_leave(tmp_path: Path) -> None:
    """`drain` returns when the worker has ended, which was told the time it has; it does not come back, and
    others go on. An unknown one, and the last of a role, are refused by name.
    """
    config = state_file(tmp_path)
    with up_in_pipe(tmp_path) as (process, screen):
        screen.await_text(_READY)
        drained = anabranch("drain", "attention-1", "--grace", "45", "--config", config)
        assert (drained.returncode, drained.stderr.splitlines()[-1]) == (0, "attention-1 has left")
        assert grace_told(tmp_path, "attention-1") in (44, 45)
        fleet = json.loads(anabranch("status", "--json", "--config", config).stdout)
        assert "attention-1" not in {member["worker_id"] for member in fleet["membership"]["members"]}
        assert [slot["worker_id"] for slot in fleet["slots"] if slot.get("retired")] == ["attention-1"]
        last = anabranch("drain", "attention-0", "--config", config)
        assert (last.returncode, "last attention" in last.stderr) == (2, True)
        unknown = anabranch("drain", "attention-9", "--config", config)
        assert (unknown.returncode, "there is no attention-9" in unknown.stderr) == (1, True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0


def test_a_death_is_shown_logged_and_not_called_serving(tmp_path: Path) -> None:
    """Which process died and why stands in controller.log as on the terminal, and "serving" is said again
    only when nothing is missing any more.
    """
    with up_in_pipe(tmp_path) as (process, screen):
        screen.await_text(_READY)
        victims = {
            name: number
            for number in descendants(process.pid)
            for name in ("gateway-0", "dense-0")
            if f"--worker-id\0{name}\0" in Path(f"/proc/{number}/cmdline").read_text()
        }
        for number in victims.values():
            os.kill(number, signal.SIGKILL)
        screen.await_text(re.compile(_READY.pattern + ".*" + _READY.pattern, re.DOTALL))
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
        screen.await_end()
    between = _READY.split(screen.text)[1]
    events = [json.loads(line) for line in (tmp_path / "state/logs/controller.log").read_text().splitlines()]
    for name in victims:
        assert f"{name} paused: ended by SIGKILL" in between
        assert re.search(rf"^{name} ready", between, re.MULTILINE)
        assert [e for e in events if e.get("slot") == name and e["problem"] == "ended by SIGKILL"]
    assert {"opened", "ready", "stopping"} <= {event["event"] for event in events}


def test_a_record_that_cannot_be_written_again_is_not_worth_the_cluster(tmp_path: Path) -> None:
    """When a gateway comes back and the state folder takes nothing any more, the cluster serves all the same,
    and the log says why.
    """
    with up_in_pipe(tmp_path) as (process, screen):
        screen.await_text(_READY)
        (tmp_path / "state" / f"cluster.{process.pid}").mkdir()  # where the draft of the record would be
        (gateway,) = (
            number
            for number in descendants(process.pid)
            if "--worker-id\0gateway-0\0" in Path(f"/proc/{number}/cmdline").read_text()
        )
        os.kill(gateway, signal.SIGKILL)
        screen.await_text(re.compile(_READY.pattern + ".*" + _READY.pattern, re.DOTALL))
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    assert "record_not_written" in (tmp_path / "state/logs/controller.log").read_text()


def test_a_crash_of_the_controller_takes_the_processes_along(tmp_path: Path) -> None:
    """Killed without a chance to drain, `up` leaves no role process behind, and its record counts as
    dead. (Two agents of Ray's need a minute to notice.)
    """
    with up_in_pipe(tmp_path) as (process, screen):
        screen.await_text(_READY)
        processes = {
            number: started
            for number, started in descendants(process.pid).items()
            if "role_program" in Path(f"/proc/{number}/cmdline").read_text()
        }
        assert len(processes) == 4
        os.kill(process.pid, signal.SIGKILL)
        process.wait(DEADLINE_S)
        await_end(processes)
    with pytest.raises(NotFound, match="is dead"):
        StateFolder(tmp_path / "state").read()


def await_end(processes: dict[int, str]) -> None:
    """Wait until the kernel says that all of them have ended."""
    for number in alive(processes):
        try:
            descriptor = os.pidfd_open(number)
        except ProcessLookupError:
            continue
        with os.fdopen(descriptor):
            poll = select.poll()
            poll.register(descriptor)
            assert poll.poll(DEADLINE_S * 1000), f"process {number} still runs"


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    """A port in use ends the start at once with one line and status 1."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with up_in_pipe(tmp_path, f"gateway.port={port}") as (process, screen):
            assert process.wait(DEADLINE_S) == 1
            screen.await_end()
    assert re.search(rf"^anabranch: .*{port}.*in use", screen.text, re.MULTILINE)
    assert "Traceback" not in screen.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "dense.thraeds=2"], "dense.threads"),
        (["--set", "dense.threads"], "key=value"),
        (["--set", "dense.threads=[1"], "YAML"),
        (["--arena", "lots"], "512MiB"),
        (["--arena", "2Gb"], "MB, GB"),
        (["--set", "dense=3"], "dense: must be a section"),
        (["--dtype", "int3"], "float32"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(words: list[str], said: str) -> None:
    """What the user can correct ends with status 2 and one line that says how."""
    result = anabranch("up", *words)
    assert result.returncode == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_help_teaches_defaults_and_shows_flags_as_flags() -> None:
    """`up --help` names what happens without a flag; a flag takes no value."""
    shown = " ".join(anabranch("up", "--help").stdout.replace("│", " ").split())
    assert "gateway.port; default 8650" in shown
    assert "--insecure Allow" in shown
    assert "2 refused for what you can correct" in " ".join(anabranch("--help").stdout.split())


def test_the_printed_configuration_is_the_one_given(tmp_path: Path) -> None:
    """`anabranch config` prints a file to begin with, and what a short one comes to."""
    file = tmp_path / "cluster.yaml"
    file.write_text("dense: {threads: 3}\n")
    printed = anabranch("config", "--config", str(file))
    assert printed.returncode == 0
    (tmp_path / "whole.yaml").write_text(printed.stdout)
    assert configuration.load(tmp_path / "whole.yaml") == configuration.load(file)
    assert "# Compute threads" in anabranch("config").stdout


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("attention.arena=0", r"attention\.arena: 0 bytes do not hold one block"),
        ("attention.tiers=[{arena: 9}]", r"attention\.tiers\.0\.arena: 9 bytes do not hold one block"),
        ("gateway.host=0.0.0.0", "--insecure"),
        ("attention.host=0.0.0.0", "--insecure"),
    ],
)
def test_what_a_role_would_refuse_is_refused_before_ray(tmp_path: Path, setting: str, said: str) -> None:
    """One line and status 2, and Ray's folder was never made: nobody waits for what can be known at once."""
    with up_in_pipe(tmp_path, setting) as (process, screen):
        assert process.wait(DEADLINE_S) == 2
        screen.await_end()
    assert re.search(rf"^anabranch: .*{said}", screen.text, re.MULTILINE)
    assert "controller at" not in screen.text
    assert list(Path("/tmp").glob(f"anabranch-ray-*/r/session_*_{process.pid}")) == []
