"""Contenders of `anabranch bench serve`: what they are asked, what they answer, and how they fail."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import sys
from pathlib import Path

import pytest

from anabranch.cli.bench.contender import Cell, Contender
from anabranch.cli.bench.serve import cell_of, rounds
from anabranch.cli.bench.sweep import Candidate, Trial, peer_candidates
from cluster.errors import InvalidRequest, Unavailable

PROGRAM = """
import json, sys
settings = json.loads(sys.argv[1])
print("a library greets")
print(json.dumps({"ready": {"version": 1}}), flush=True)
for line in sys.stdin:
    work = json.loads(line)
    assert [len(prompt) for prompt in work["prompts"]] == [5, 5, 5, 5]
    print("{not json")
    print(json.dumps({"prefill_s": 2.0, "step_s": [1.0, settings["step_s"], 0.25]}), flush=True)
"""


def contender(tmp_path: Path, program: str, step_s: float = 0.5) -> Contender:
    """A contender that runs a small program."""
    file = tmp_path / "program.py"
    file.write_text(program)
    return Contender("it", [sys.executable, str(file)], {"step_s": step_s})


def test_a_round_counts_tokens_over_the_median_step(tmp_path: Path) -> None:
    """Decode: batch over the median step; prefill: all prompt tokens over its time. Noise is passed over."""
    with contextlib.closing(contender(tmp_path, PROGRAM)) as it:
        assert it.settings == {"step_s": 0.5, "version": 1}
        served = it.serve(Cell(4, 5), seed=1)
    assert (served.decode, served.prefill) == (8.0, 10.0)


def test_a_cell_without_a_full_step_is_refused_by_name(tmp_path: Path) -> None:
    """Where the first sequences end before the last begin nothing is measured; warming up goes on."""
    program = PROGRAM.replace('[1.0, settings["step_s"], 0.25]', "[]")
    with contextlib.closing(contender(tmp_path, program)) as it:
        assert it.work(Cell(4, 5), seed=0)["prefill_s"] == 2.0
        with pytest.raises(InvalidRequest, match=r"it, 4x5: .* --step-tokens"):
            it.serve(Cell(4, 5), seed=1)


def test_contenders_get_the_same_prompts_in_turn(tmp_path: Path) -> None:
    """Each has `repeats` rounds kept, after one thrown away; a cell's work depends on its seed alone."""
    said: list[str] = []
    with (
        contextlib.closing(contender(tmp_path, PROGRAM)) as one,
        contextlib.closing(contender(tmp_path, PROGRAM, 0.25)) as other,
    ):
        served = rounds(Cell(4, 5), {"one": one, "other": other}, 3, said.append)
    assert {name: [one.decode for one in found] for name, found in served.items()} == {
        "one": [8.0] * 3,
        "other": [16.0] * 3,
    }
    assert len(said) == 6, "each round that counts is told"
    assert Cell(2, 3).work(1) == Cell(2, 3).work(1) != Cell(2, 3).work(2)


@pytest.mark.parametrize(
    ("program", "said"),
    [("raise SystemExit('no model there')", "no model there"), ("print('hello')", "ended")],
)
def test_a_contender_that_does_not_come_up_says_why(tmp_path: Path, program: str, said: str) -> None:
    """What it wrote at the end is in the error."""
    with pytest.raises(Unavailable, match=said):
        contender(tmp_path, program)


def test_a_contender_that_dies_at_work_says_why(tmp_path: Path) -> None:
    """A batch it cannot serve ends the bench with its own words."""
    with (
        contextlib.closing(contender(tmp_path, PROGRAM)) as it,
        pytest.raises(Unavailable, match="AssertionError"),
    ):
        it.serve(Cell(3, 5), seed=1)


def test_a_contender_ends_with_what_it_started(tmp_path: Path) -> None:
    """A process that a contender started holds a pipe open: it ends when the contender is closed."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    program = f"""
import json, subprocess, sys
writer = open({str(pipe)!r}, "w")
child = subprocess.Popen(["sleep", "600"], stdout=writer)
writer.close()
print(json.dumps({{"ready": {{}}}}), flush=True)
sys.stdin.read()
"""
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with open(reader, "rb", buffering=0) as end:
        contender(tmp_path, program).close()
        ready, _, _ = select.select([end], [], [], 20)
        assert ready, "somebody still holds the pipe"
        assert end.read() == b""


def test_a_sweep_keeps_the_fastest_and_every_score(tmp_path: Path) -> None:
    """The best candidate runs on and carries all scores; the others are closed."""
    started: list[Contender] = []

    def start(candidate: Candidate) -> Contender:
        started.append(contender(tmp_path, PROGRAM, candidate.settings["step_s"]))
        return started[-1]

    rounds_now = functools.partial(rounds, say=lambda _: None)
    trial = Trial(start, (Cell(4, 5),), rounds_now, lambda _: None)
    speeds = (0.5, 0.3, 0.6)
    with contextlib.closing(
        trial.best([Candidate("it", (), {"step_s": step_s}) for step_s in speeds])
    ) as best:
        assert best is started[1]
        assert [tried["step_s"] for tried in best.settings["sweep"]] == list(speeds)
        assert best.settings["sweep"][1]["score"] == max(tried["score"] for tried in best.settings["sweep"])
        assert best.serve(Cell(4, 5), seed=1).prefill == 10.0


def test_peers_are_tried_with_fewer_threads_too() -> None:
    """Every candidate tells its threads; vLLM's are bound to as many cores."""
    found = peer_candidates("python", Path("programs"), 2)
    assert [one.settings["threads"] for one in found["transformers"]] == [2, 1]
    bound = {
        (one.settings["threads"], one.environment["VLLM_CPU_OMP_THREADS_BIND"]) for one in found["vllm_cpu"]
    }
    assert bound == {(2, "0-1"), (1, "0")}


def test_cells_are_read_as_they_are_written() -> None:
    """`8x128` is a batch of eight prompts of 128 tokens; anything else is refused."""
    assert cell_of("8x128") == Cell(8, 128)
    for text in ("8", "x", "8x", "0.5x3", ""):
        with pytest.raises(InvalidRequest, match="BATCHxPROMPT"):
            cell_of(text)
