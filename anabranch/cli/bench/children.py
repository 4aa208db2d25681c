"""Processes of a bench: told their settings, they say a line when ready, and end with their input."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from anabranch.cli.bench.step_settings import StepSettings
from cluster.errors import ConfigError


def start(
    stack: contextlib.ExitStack, module: str, settings: StepSettings
) -> tuple[subprocess.Popen[str], str]:
    """A process that ends when its standard input does; and its first line."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, settings.to_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    stack.enter_context(process)
    assert process.stdin is not None
    stack.callback(process.stdin.close)
    return process, next_line(process)


def next_line(process: subprocess.Popen[str]) -> str:
    """What a process says next. Raises ConfigError where it ended instead."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise ConfigError("a process of the bench ended; what it wrote stands above")
    return line


def peak_bytes(process_id: int) -> int:
    """The most memory a living process ever had resident."""
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0


def processor_s(process_id: int) -> float:
    """Seconds of processor time a living process has taken so far."""
    after_name = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    user, system = after_name[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
