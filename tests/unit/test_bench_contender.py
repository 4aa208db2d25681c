"""Contenders of `anabranch bench serve`: what they are asked, what they answer, and how they fail."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from anabranch.cli.bench.contender import Cell, Contender
from anabranch.cli.bench.serve import cell_of, rounds
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


def test_contenders_get_the_same_prompts_in_turn(tmp_path: Path) -> None:
    """Each has `repeats` rounds kept, after one thrown away; a cell's work depends on its seed alone."""
    with (
        contextlib.closing(contender(tmp_path, PROGRAM)) as one,
        contextlib.closing(contender(tmp_path, PROGRAM, 0.25)) as other,
    ):
        served = rounds(Cell(4, 5), {"one": one, "other": other}, 3)
    assert {name: [one.decode for one in found] for name, found in served.items()} == {
        "one": [8.0] * 3,
        "other": [16.0] * 3,
    }
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


def test_cells_are_read_as_they_are_written() -> None:
    """`8x128` is a batch of eight prompts of 128 tokens; anything else is refused."""
    assert cell_of("8x128") == Cell(8, 128)
    for text in ("8", "x", "8x", "0.5x3", ""):
        with pytest.raises(InvalidRequest, match="BATCHxPROMPT"):
            cell_of(text)
