"""Clusters that a sweep starts: real processes under Ray, one after another, and none of them left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loadgen.results import PAGE
from loadgen.sweep.results import POINTS
from tests.integration.clusters import alive, descendants
from tests.models import tiny_model
from tests.serving import wait_until

pytestmark = pytest.mark.system  # starts Ray several times

PROGRAM = "from anabranch.cli.entry import loadgen; loadgen()"


def _command(tmp_path: Path, *arguments: str) -> list[str]:
    model = tiny_model(tmp_path / "model", tokenizer=True, max_position_embeddings=512)
    load = ("--prompt", "16", "--output", "8", "--arena", "8MiB", "--out", "results")
    return [sys.executable, "-c", PROGRAM, "sweep", "up", "--model", str(model), *load, *arguments]


def test_each_shape_is_started_measured_and_stopped(tmp_path: Path) -> None:
    """With the cache in the dense worker and in two attention workers; a setting that cannot be is told."""
    done = subprocess.run(
        _command(
            tmp_path,
            *("--attention", "0,2", "--vary", "dense.step_tokens=32,64", "--concurrency", "2"),
            *("--requests", "8", "--kinds", "dense=h100,attention=h20"),
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in (tmp_path / "results" / POINTS).read_text().splitlines()]
    assert [point["subject"] for point in points] == [
        "1 dense + 0 attention, dense.step_tokens 64",
        "1 dense + 2 attention, dense.step_tokens 64",
    ]
    assert [point["completed"] for point in points] == [8, 8]
    assert [point["shape"] for point in points] == ["dense=1xh100", "dense=1xh100,attention=2xh20"]
    page = (tmp_path / "results" / PAGE).read_text()
    assert page.count("dense.max_batch must not exceed dense.step_tokens") == 2


def test_ctrl_c_stops_the_cluster_and_shows_what_there_is(tmp_path: Path) -> None:
    """Nothing runs on."""
    process = subprocess.Popen(
        _command(tmp_path, "--attention", "1", "--concurrency", "1,2,4", "--requests", "64"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    points = tmp_path / "results" / POINTS
    wait_until(lambda: points.exists() and points.read_text().count("\n") >= 1, 90)
    left = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "written to results" in stdout
    assert (tmp_path / "results" / PAGE).is_file()
    assert left
    wait_until(lambda: not alive(left), 30)
