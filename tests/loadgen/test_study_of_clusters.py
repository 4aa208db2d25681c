"""A study's emulated clusters: real processes under Ray, beside simulations of the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadgen.results import PAGE

pytestmark = pytest.mark.system  # starts Ray

PROGRAM = "from anabranch.cli.entry import loadgen; loadgen()"

STUDY = """
seeds = [1]
[[part]]
title = "Capped instances"
ways = ["emulated", "simulated"]
model = "llama3-8b"
dilation = 10
load = { concurrency = 4, requests = 8, prompt = "64", output = "24" }
[[part.case]]
name = "borrowing"
dense = "h100"
attention = "h20x2"
dense_workers = 2
arena_tokens = 256
overlap = false
settings = { "placement.instances" = "borrowing" }
"""


def test_an_emulated_case_is_started_measured(tmp_path: Path) -> None:
    """Two dense workers on capped arenas; its steps last about as long as the simulation says."""
    (tmp_path / "asked.toml").write_text(STUDY)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "study", "asked.toml", "--out", "found"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "found" / "results.json").read_text())["runs"]
    emulated, simulated = (run["figures"] for run in runs)
    assert emulated["mean_tpot_ms"][0] == pytest.approx(simulated["mean_tpot_ms"][0], rel=0.5)
    assert emulated["joules_per_output_token"][0] > 0
    assert (tmp_path / "found" / PAGE).exists()
