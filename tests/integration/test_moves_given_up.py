"""Moves that fail on the way: the sequence goes on, and the target stays usable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.types import WorkerId
from tests.cluster_harness import DenseCluster, Output, Shape, assert_continues, counted, request, wait_until
from tests.models import Reference, random_prompt, reference_tokens
from workers.dense.sequences import wire_generation

PROMPT = random_prompt(120, 1)
COUNT = 120
FIRST, SECOND, THIRD = (WorkerId(f"attention-{index}") for index in range(3))
MOVES = "anabranch_dense_moves"


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    """What transformers says after `PROMPT`."""
    (found,) = reference_tokens(folder, [PROMPT], COUNT)
    return found


def assert_no_hole(output: Output) -> None:
    """The last map names every position."""
    ends = [shard.end for shard in output.maps[-1]]
    firsts = [shard.first for shard in output.maps[-1]]
    assert firsts == [0, *ends[:-1]], output.maps[-1]


def test_a_target_that_loses_its_lease_in_the_middle(folder: Path, reference: Reference) -> None:
    """What the target held of the sequence, a copy under way among it, is gone; the move must not go on from
    its middle.
    """
    shape = Shape(attention_workers=2, shard_tokens=64, overrides={"placement": {"move_tokens": 2}})
    with DenseCluster(folder, shape) as cluster:
        submission = cluster.submit(request(PROMPT, COUNT))
        output = cluster.listener.wait(submission, lambda output: len(output.token_ids) >= 5)
        source, target = (shard.worker for shard in output.maps[-1][:2])
        store = cluster.workers[target].core.store
        cluster.engine.move(submission.key, source, target)

        def half() -> bool:
            return any(
                held.shard.first == 0 and held.committed_tokens >= 8 for held in store.locate(submission.key)
            )

        wait_until(half)
        store.release(submission.key, wire_generation(1, 0))  # as the end of its lease does
        cluster.listener.wait(submission)
        assert_no_hole(output)
        assert_continues(output, reference)


def test_a_lost_answer_does_not_end_the_engine(folder: Path, reference: Reference) -> None:
    """A target took the copy of a shard and its answer was lost, so that the move was given up: later room
    behind that shard comes from there.
    """
    shape = Shape(attention_workers=2, step_tokens=4, max_batch=4)
    with DenseCluster(folder, shape) as cluster:
        submission = cluster.submit(request(PROMPT, COUNT))
        output = cluster.listener.output(submission)
        wait_until(lambda: bool(output.maps))
        at = [shard.worker for shard in output.maps[-1]]
        tail = output.maps[-1][-1]
        other = FIRST if at[-1] == SECOND else SECOND
        end = tail.first + 32
        cluster.workers[other].core.store.reserve(
            submission.key, wire_generation(1, 0), tail.first, end, apart=True
        )
        cluster.listener.wait(submission)
        assert not cluster.engine.failed.done()
        assert_continues(output, reference)


def test_a_target_that_was_given_up_can_be_used_again(folder: Path, reference: Reference) -> None:
    """A copy's lease ends in the middle of a move, which fences its generation there; then the other workers
    drain, so that room can be had only there.
    """
    shape = Shape(attention_workers=3, shard_tokens=144, overrides={"placement": {"move_tokens": 2}})
    with DenseCluster(folder, shape) as cluster:
        submission = cluster.submit(request(PROMPT, COUNT))
        output = cluster.listener.wait(submission, lambda output: len(output.token_ids) >= 2)
        at = {shard.worker for shard in output.maps[-1]}
        target = next(worker for worker in (FIRST, SECOND, THIRD) if worker not in at)
        store = cluster.workers[target].core.store
        cluster.engine.move(submission.key, output.maps[-1][0].worker, target)
        wait_until(lambda: any(held.committed_tokens >= 4 for held in store.locate(submission.key)))
        store.release(submission.key, wire_generation(1, 0))
        wait_until(lambda: counted(cluster.engine, MOVES, outcome="given_up") == 1)
        cluster.engine.pool.update(
            [replace(member, is_admitting=member.worker == target) for member in cluster.members()]
        )
        assert_continues(cluster.listener.wait(submission), reference)
        assert target in {shard.worker for shard in output.maps[-1]}
