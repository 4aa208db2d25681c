"""How what a dense worker knows of a prefix and what the directory names become places to ask."""

from __future__ import annotations

from cluster.policies.directory import Life, Run
from cluster.policies.prefixes import Source, go_on
from cluster.types import Epoch, WorkerId

SIZE = 4
A, B, C = (Life(WorkerId(name), Epoch(number)) for number, name in enumerate("abc", 1))


def source(life: Life, first: int, end: int) -> Source:
    """Positions first..end at a life."""
    return Source(life.worker, life.epoch, first, end)


def leads_to_a_and_b(worker: WorkerId, epoch: Epoch) -> bool:
    """There is no lane to C."""
    return Life(worker, epoch) in (A, B)


def test_runs_follow_what_is_known() -> None:
    """A run at the worker of the blocks before becomes one piece with them; another one begins behind."""
    known = (source(A, 0, 8),)
    runs = (Run(1, (B, A)), Run(2, (B,)))
    assert go_on(known, runs, SIZE, leads_to_a_and_b) == (source(A, 0, 12), source(B, 12, 20))


def test_nothing_is_known_before_the_first_run() -> None:
    """Without sources the first run begins at position 0."""
    assert go_on((), (Run(2, (B,)),), SIZE, leads_to_a_and_b) == (source(B, 0, 8),)


def test_a_run_out_of_reach_ends_the_prefix() -> None:
    """Of several holders one with a lane is taken; where there is none, nothing behind is of use."""
    runs = (Run(1, (C, B)), Run(1, (C,)), Run(1, (A,)))
    assert go_on((), runs, SIZE, leads_to_a_and_b) == (source(B, 0, 4),)


def test_holders_take_turns() -> None:
    """Requests that find the same blocks at two workers are read at both; each keeps to one of them."""
    runs = (Run(1, (A, B)), Run(2, (B, A)))
    found = [go_on((), runs, SIZE, leads_to_a_and_b, turn) for turn in (0, 1, 2)]
    assert found == [(source(A, 0, 12),), (source(B, 0, 12),), (source(A, 0, 12),)]
