"""Short seeds of `anabranch chaos`: real processes of every role are lost, and no token changes."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from anabranch.cli.chaos.near_ties import NEAR_TIE, gap_at
from anabranch.cli.chaos.run import Course, Settings, run
from anabranch.cli.chaos.schedule import KINDS, ROLES
from anabranch.cli.chaos.targets import LOAD_MOST
from anabranch.cli.chaos.verdict import verdict

pytestmark = [pytest.mark.system, pytest.mark.timeout(360)]  # many processes, which machines in use starve

SHORT = Settings(seed=15, requests=60, seconds_least=75.0, faults_most=9, expiry_ms=5000)
"""Lanes over gRPC, so that everything can be cut off; a long expiry, for machines that are busy. One round of
faults, and time for it however fast the machine; a frozen gateway and a dense worker that is cut off stay so
until they were replaced.
"""

LOST = Settings(seed=133, requests=32, load=0.7, expiry_ms=5000, lost_capacity=True)
"""A seed whose losses are short."""


def test_no_token_changes_while_processes_of_every_role_are_lost(tmp_path: Path) -> None:
    """Processes are killed, frozen and cut off, some at named points, while requests run through the public
    client, each role in each way: every answer is that of the undisturbed run, nothing hangs, every block is
    free at the end, and what was replaced leaves by itself when it comes back. How long clients waited is not
    judged here: that is the machine's as much as ours.
    """
    course: Course = asyncio.run(run(SHORT, tmp_path, lambda _doing: None))
    report = verdict(course, partial(gap_at, tmp_path / "model"), NEAR_TIE)
    assert report["failures"] == [], json.dumps(report, indent=1)
    struck = {(fault["role"], fault["kind"]) for fault in report["faults"]}
    assert struck == set(itertools.product(ROLES, KINDS)), "the load was over before all were struck"
    assert all(fault["streams"] > 0 for fault in report["faults"])
    assert report["load_share"] <= LOAD_MOST


def test_lost_capacity_costs_time_and_errors_but_no_token(tmp_path: Path) -> None:
    """Each role is left without any process for some seconds, and attention with one that cannot hold what
    runs: requests wait or fail with an error that says so, and nothing they received is wrong; when the fleet
    is whole everything is served, what had failed included.
    """
    course: Course = asyncio.run(run(LOST, tmp_path, lambda _doing: None))
    report = verdict(course, partial(gap_at, tmp_path / "model"), NEAR_TIE)
    assert report["failures"] == [], json.dumps(report, indent=1)
    assert len(report["losses"]) == 4
    assert all(loss["requests"] > 0 for loss in report["losses"])
    assert sum(len(loss["next_token_s"]) for loss in report["losses"]) > 0
    assert report["moves"] > 0, "nothing that was lost could have been on its way from one worker to another"


def test_a_failure_is_the_status_of_the_command() -> None:
    """A run that proves nothing, since nobody was struck, fails; and so does the command."""
    command = [sys.executable, "-m", "anabranch.cli", "chaos", "--requests", "1", "--faults", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "no fault struck" in ended.stdout, ended.stderr
    assert ended.returncode == 1
