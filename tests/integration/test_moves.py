"""Shards that move between attention workers while their sequences decode: no token changes or leaks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from cluster.types import Generation, SequenceKey, WorkerId
from tests.cluster_harness import (
    DenseCluster,
    Output,
    Shape,
    assert_continues,
    counted,
    request,
    wait_until,
)
from tests.models import Reference, random_prompt, reference_tokens
from tests.pace import slowly
from workers.dense.engine import Engine
from workers.dense.members import AttentionMember

PROMPT = random_prompt(75, 1)
COUNT = 240
FIRST, SECOND, THIRD = (WorkerId(f"attention-{index}") for index in range(3))
THREE = Shape(attention_workers=3, overrides={"placement": {"move_tokens": 10}})
MOVES = "anabranch_dense_moves"
MOVED = "anabranch_dense_tokens_moved"
STEPS = "anabranch_dense_steps"
LOST = "anabranch_dense_tokens_lost"


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    """What transformers says after `PROMPT`."""
    (found,) = reference_tokens(folder, [PROMPT], COUNT)
    return found


def some(output: Output) -> bool:
    """A few tokens came."""
    return len(output.token_ids) >= 5


def _has_moved(engine: Engine, moves: int) -> bool:
    return counted(engine, MOVES, outcome="done") == moves


def workers_of(output: Output) -> list[WorkerId]:
    """Where the shards lie, in order, by the last map."""
    return [shard.worker for shard in output.maps[-1]]


@pytest.mark.parametrize("transports", [("local",), ("grpc",)])
def test_a_moved_shard_changes_no_token(
    transports: tuple[str, ...], folder: Path, reference: Reference
) -> None:
    """Every shard of a decoding sequence, its tail too, moves to one worker: the map says so, the sources
    hold nothing any more, no KV was recomputed but the last steps', and the tokens are the reference's.
    """
    with DenseCluster(folder, replace(THREE, transports=transports)) as cluster:
        submission = cluster.submit(request(PROMPT, COUNT))
        cluster.listener.wait(submission, some)
        with slowly(cluster.engine):
            for done, worker in enumerate((FIRST, SECOND, THIRD, THIRD)):
                cluster.engine.move(submission.key, worker, FIRST if worker is not FIRST else THIRD)
                wait_until(partial(_has_moved, cluster.engine, done + 1))
        assert_continues(cluster.listener.wait(submission), reference)
        assert counted(cluster.engine, LOST) == 0
        assert counted(cluster.engine, MOVED) > len(PROMPT)


@pytest.mark.parametrize("tokens", [16, 31])
def test_the_beginning_of_a_shard_moves_alone(folder: Path, reference: Reference, tokens: int) -> None:
    """Whole blocks of a shard go to another worker and the rest stays: the map has both, the source gave back
    what went, no KV was recomputed, and the tokens are the reference's.
    """
    with DenseCluster(folder, replace(THREE, shard_tokens=500)) as cluster:
        submission = cluster.submit(request(PROMPT, COUNT))
        output = cluster.listener.wait(submission, some)
        (source,) = workers_of(output)
        target = next(worker for worker in (FIRST, SECOND, THIRD) if worker != source)
        with slowly(cluster.engine):
            cluster.engine.move(submission.key, source, target, tokens)
            wait_until(partial(_has_moved, cluster.engine, 1))
            wait_until(lambda: workers_of(output) == [target, source])
        moved, rest = output.maps[-1]
        assert (moved.first, moved.end, rest.first) == (0, 16, 16)
        free = cluster.free_blocks()
        assert free[target][0] == free[target][1] - 1
        assert_continues(cluster.listener.wait(submission), reference)
        assert counted(cluster.engine, LOST) == 0
        assert counted(cluster.engine, MOVED) == 16


def test_less_than_a_block_does_not_move(folder: Path, reference: Reference) -> None:
    """A part smaller than a block is nothing to move."""
    with DenseCluster(folder, THREE) as cluster:
        submission = cluster.submit(request(PROMPT, COUNT))
        output = cluster.listener.wait(submission, some)
        source = workers_of(output)[0]
        cluster.engine.move(submission.key, source, THIRD if source != THIRD else FIRST, 15)
        assert_continues(cluster.listener.wait(submission), reference)
        assert counted(cluster.engine, MOVED) == 0


def test_a_prompt_that_is_still_computed_can_move(folder: Path, reference: Reference) -> None:
    """A shard moves while its prompt is prefilled in small chunks, pieces first, then the switch."""
    shape = replace(THREE, step_tokens=4, max_batch=4)
    with DenseCluster(folder, shape) as cluster:
        submission = cluster.submit(request(PROMPT, COUNT))
        output = cluster.listener.output(submission)
        wait_until(lambda: counted(cluster.engine, STEPS) >= 4)  # of an empty shard only the room would move
        first = output.maps[-1][0].worker
        target = next(worker for worker in (FIRST, SECOND, THIRD) if worker not in workers_of(output)[:2])
        cluster.engine.move(submission.key, first, target)
        assert_continues(cluster.listener.wait(submission), reference)
        assert first not in workers_of(output)[:1]


def test_a_full_target_is_not_overcommitted(folder: Path, reference: Reference) -> None:
    """Where the target has no room the move is refused, the sequence stays where it is, and goes on."""
    shape = Shape(attention_workers=2, worker_blocks=24)
    with DenseCluster(folder, shape) as cluster:
        submission = cluster.submit(request(PROMPT, COUNT))
        output = cluster.listener.wait(submission, some)
        store, other = cluster.workers[SECOND].core.store, SequenceKey("filler")
        store.reserve(other, Generation(1), 0, 16 * store.available)
        before = workers_of(output)
        with slowly(cluster.engine):
            cluster.engine.move(submission.key, FIRST, SECOND)
            wait_until(lambda: counted(cluster.engine, MOVES, outcome="given_up") == 1)
        assert workers_of(output)[: len(before)] == before
        store.release(other, Generation(1))
        assert_continues(cluster.listener.wait(submission), reference)


@pytest.mark.parametrize("dies", ["source", "target"])
def test_either_side_may_die_on_the_way(dies: str, folder: Path, reference: Reference) -> None:
    """The source or the target of a move is killed as soon as the move began: the stream goes on."""
    with DenseCluster(folder, THREE) as cluster:
        submission = cluster.submit(request(PROMPT, COUNT))
        cluster.listener.wait(submission, some)
        cluster.engine.move(submission.key, FIRST, SECOND)
        cluster.kill_worker(FIRST if dies == "source" else SECOND)
        cluster.tell()
        assert_continues(cluster.listener.wait(submission), reference)


def test_an_abort_in_the_middle_frees_both_sides(folder: Path) -> None:
    """A sequence that is aborted while one of its shards moves leaves nothing anywhere."""
    with DenseCluster(folder, THREE) as cluster:
        submission = cluster.submit(request(PROMPT, 250))
        cluster.listener.wait(submission, some)
        cluster.engine.move(submission.key, FIRST, SECOND)
        cluster.engine.abort(submission.key, submission.generation, 1.0)
        cluster.wait_all_free()


def test_a_draining_worker_is_emptied_under_load(folder: Path) -> None:
    """When a worker drains, every shard moves off it while eight sequences decode: it holds nothing long
    before they end, hardly anything is recomputed, and no token changes.
    """
    prompts = [random_prompt(length, length) for length in (70, 33, 9, 64, 40, 55, 12, 31)]
    references = reference_tokens(folder, prompts, COUNT)
    with DenseCluster(folder, THREE) as cluster:
        submitted = [cluster.submit(request(prompt, COUNT)) for prompt in prompts]
        for submission in submitted:
            cluster.listener.wait(submission, some)
        store = cluster.workers[FIRST].core.store
        store.draining = True
        cluster.engine.pool.update([_draining(member) for member in cluster.members()])
        assert store.empty.wait(20.0)
        outputs = [cluster.listener.wait(submission) for submission in submitted]
        for output, found in zip(outputs, references, strict=True):
            assert_continues(output, found)
        assert counted(cluster.engine, LOST) == 0


def _draining(member: AttentionMember) -> AttentionMember:
    return replace(member, is_admitting=member.worker != FIRST)
