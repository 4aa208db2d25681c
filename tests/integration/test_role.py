"""What every role process does around its work, seen from outside: real processes and signals."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter

from cluster.config import Config
from cluster.errors import Unavailable
from cluster.telemetry_settings import TelemetryConfig
from cluster.types import WorkerId, draw_epoch
from workers import role
from workers.role import RoleContext

DEADLINE_S = 20.0

# Says that it runs, and after being told to stop that it drains, which takes it for ever.
_STUBBORN = """
import sys, threading
from workers import role
def serve(context):
    context.log.info("running")
    context.stop.wait()
    context.log.info("draining")
    threading.Event().wait()
sys.exit(role.run("attention", serve, sys.argv[1:]))
"""
_OBEDIENT = _STUBBORN.replace("    threading.Event().wait()\n", "")
_FAILING = """
import sys
from cluster.errors import {error}
from workers import role
def serve(context):
    raise {error}("it will not do")
sys.exit(role.run("attention", serve, sys.argv[1:]))
"""


def arguments(config: Path) -> list[str]:
    """What the controller tells a role process."""
    return [
        "--config",
        str(config),
        "--worker-id",
        "attention-3",
        "--index",
        "3",
        "--controller",
        "127.0.0.1:1",
    ]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A configuration file with nothing but defaults."""
    file = tmp_path / "cluster.yaml"
    file.write_text(Config().to_yaml())
    return file


@contextmanager
def running(script: str, config_file: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs a script with the arguments of a role, and more; killed at the end if need be."""
    command = [sys.executable, "-c", script, *arguments(config_file), *more]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def next_event(process: subprocess.Popen[str]) -> dict[str, str]:
    """The next line of its log."""
    assert process.stderr is not None
    event: dict[str, str] = json.loads(process.stderr.readline())
    return event


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_and_the_process_ends_well(config_file: Path, number: signal.Signals) -> None:
    """SIGTERM and Ctrl-C let the role finish; the exit status is 0."""
    with running(_OBEDIENT, config_file) as process:
        assert next_event(process)["event"] == "running"
        process.send_signal(number)
        assert next_event(process)["event"] == "draining"
        assert process.wait(DEADLINE_S) == 0


def test_a_second_signal_ends_the_process_at_once(config_file: Path) -> None:
    """Whoever insists is obeyed, whatever the role is doing."""
    with running(_STUBBORN, config_file) as process:
        next_event(process)
        process.send_signal(signal.SIGTERM)
        assert next_event(process)["event"] == "draining"
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM


def test_every_log_line_says_who_speaks(config_file: Path) -> None:
    """Role, worker and epoch stand in each line, so that one search follows a request."""
    with running(_OBEDIENT, config_file) as process:
        event = next_event(process)
    assert (event["role"], event["worker"]) == ("attention", "attention-3")
    assert int(event["epoch"], 16) > 0


@pytest.mark.parametrize(
    ("error", "status"),
    [("ConfigError", 2), ("UnsupportedModel", 2), ("VersionMismatch", 2), ("Fenced", 1), ("Unavailable", 1)],
)
def test_an_error_is_one_line_and_a_status(config_file: Path, error: str, status: int) -> None:
    """2 where starting again would not help, 1 where it may; no traceback for errors of the world."""
    with running(_FAILING.format(error=error), config_file) as process:
        _, said = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == status
        assert said == "attention: it will not do\n"


def test_a_wrong_key_is_refused_by_name(config_file: Path) -> None:
    """A typing error in the file ends the process with status 2 and names the nearest key."""
    config_file.write_text("attention: {arenna: 1GiB}\n")
    with running(_OBEDIENT, config_file) as process:
        _, said = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == role.EXIT_REFUSED
        assert "attention.arenna" in said
        assert "attention.arena" in said
        assert len(said.splitlines()) == 1


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    """--help says how to start a cluster by hand, what the signals do and what the statuses mean."""
    with pytest.raises(SystemExit) as exit_:
        role.parse("dense", ["--help"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    for word in ("--config FILE", "--worker-id NAME", "python -m workers.dense", "SIGTERM", "Exit status"):
        assert word in said


def test_fault_points_are_armed_by_a_start_argument_alone(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is told of a listener says who it is, and first, in its log, that it is armed. One
    that merely inherits a variable, as a whole cluster may by accident, is not.
    """
    path = str(tmp_path / "listener")
    monkeypatch.setenv("ANABRANCH_FAULT_POINTS", path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with running(_OBEDIENT, config_file) as process:
            assert next_event(process)["event"] == "running"
        with running(_OBEDIENT, config_file, "--fault-points", path) as process:
            assert next_event(process)["event"] == "fault_points_armed"
            listener.settimeout(DEADLINE_S)
            armed, _ = listener.accept()
            with armed:
                assert armed.recv(100).decode() == f"attention-3 {process.pid}\n"


def test_the_worker_is_named_after_role_and_index(config_file: Path) -> None:
    """Without --worker-id the slot's name follows from the role and the index."""
    words = ["--config", str(config_file), "--index", "2", "--controller", "127.0.0.1:1"]
    parsed: list[RoleContext] = []
    # On another thread, so that the signals of the test run stay its own.
    thread = threading.Thread(target=lambda: parsed.append(role.parse("dense", words)))
    thread.start()
    thread.join()
    assert (parsed[0].worker_id, parsed[0].index, parsed[0].epoch != 0) == ("dense-2", 2, True)


def context_of(config: Config) -> RoleContext:
    """A role that was told this configuration."""
    return RoleContext("dense", config, WorkerId("dense-0"), 0, draw_epoch(), "127.0.0.1:1")


def test_a_wildcard_is_replaced_by_an_address_others_reach() -> None:
    """What is bound to all interfaces is announced by the one that leads to the controller."""
    context = context_of(Config())
    assert context.reachable("0.0.0.0", 7) == "127.0.0.1:7"
    assert context.reachable("10.1.2.3", 7) == "10.1.2.3:7"
    assert context.reachable("::1", 7) == "[::1]:7"


def test_a_controller_that_has_no_address_yet_is_told_in_words() -> None:
    """Where names come with the network, as in a new pod, the role fails and can be started again."""
    context = replace(context_of(Config()), controller="nowhere.invalid:8600")
    with pytest.raises(Unavailable, match=r"nowhere\.invalid:8600"):
        context.reachable("0.0.0.0", 7)


def test_metrics_are_served_even_if_the_port_is_taken() -> None:
    """A port that somebody else has is replaced by a free one, and the address says which."""
    registry = CollectorRegistry()
    Counter("words", "Words counted.", registry=registry).inc(3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wanted = taken.getsockname()[1]
        telemetry = TelemetryConfig(metrics_port=wanted - 100)
        address = context_of(Config(telemetry=telemetry)).serve_metrics(registry, "127.0.0.1", 1)
    assert address not in ("", f"127.0.0.1:{wanted}")
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=DEADLINE_S) as page:
        assert b"words_total 3.0" in page.read()


@pytest.mark.parametrize(("given", "offset"), [("gateway", 0), ("dense", 100), ("attention", 2000)])
def test_each_role_and_index_has_a_metrics_port_of_its_own(given: str, offset: int) -> None:
    """Roles of one machine share telemetry.metrics_port: each adds its own offset and its index."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        wanted = free.getsockname()[1]
    config = Config(telemetry=TelemetryConfig(metrics_port=wanted - offset - 5))
    context = RoleContext(given, config, WorkerId("x"), 5, draw_epoch(), "127.0.0.1:1")
    assert context.serve_metrics(CollectorRegistry(), "127.0.0.1", 1) == f"127.0.0.1:{wanted}"


def test_metrics_are_off_unless_asked_for() -> None:
    """No port, no server."""
    assert context_of(Config()).serve_metrics(CollectorRegistry(), "127.0.0.1", 1) == ""


def test_memory_is_read_from_the_kernel(tmp_path: Path) -> None:
    """Resident and peak memory in bytes; zeros where the kernel does not tell."""
    memory = role.read_memory()
    assert 2**20 < memory.resident_bytes <= memory.peak_bytes
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmHWM:\t    20 kB\nVmRSS:\t    10 kB\n")
    assert role.read_memory(status) == role.Memory(10 * 1024, 20 * 1024)
    assert role.read_memory(tmp_path / "absent") == role.Memory(0, 0)
