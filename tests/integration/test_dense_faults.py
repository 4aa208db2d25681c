"""Attention workers, lanes and dense workers die mid-stream: no token wrong, repeated or missing."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

import pytest

from cluster.errors import Fenced, Internal, InvalidRequest, ResourceExhausted
from cluster.types import WorkerId
from tests.cluster_harness import (
    DenseCluster,
    Listener,
    Output,
    Shape,
    computed_tokens,
    counted,
    request,
    wait_until,
)
from tests.models import random_prompt
from workers.dense.deltas import FinishReason
from workers.dense.sequences import Submission, wire_generation
from workers.lanes.messages import LayerMessage

PROMPT = random_prompt(70, 1)
COUNT = 150

RECOMPUTED = "anabranch_dense_tokens_lost"


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    """The tokens of an undisturbed run."""
    with DenseCluster(folder, Shape(local_blocks=64)) as cluster:
        (output,) = cluster.generate([request(PROMPT, COUNT)])
    return output.token_ids


def started(cluster: DenseCluster) -> Submission:
    """A sequence that has a few tokens."""
    submission = cluster.submit(request(PROMPT, COUNT))
    cluster.listener.wait(submission, some)
    return submission


def some(output: Output) -> bool:
    """A few tokens came."""
    return len(output.token_ids) >= 20


@pytest.mark.parametrize("transport", ["local", "tcp", "grpc"])
@pytest.mark.parametrize("place", [0, -1], ids=["first shard", "tail"])
def test_a_killed_attention_worker_changes_no_token(
    transport: str, place: int, folder: Path, expected: list[int]
) -> None:
    """One of three workers dies, with the head or the tail of a sequence: what it held is computed again onto
    the others, the other shards stay, and the stream goes on with the same tokens.
    """
    with DenseCluster(folder, Shape(attention_workers=3, transports=(transport,))) as cluster:
        submission = started(cluster)
        victim = cluster.listener.output(submission).maps[-1][place].worker
        cluster.kill_worker(victim)
        cluster.tell()
        output = cluster.listener.wait(submission)
        assert output.failure is None
        assert output.token_ids == expected
        assert victim not in {shard.worker for shard in output.maps[-1]}
        lost = counted(cluster.engine, RECOMPUTED)
        assert 0 < lost < len(PROMPT) + COUNT


def test_a_killed_worker_is_noticed_without_membership(folder: Path, expected: list[int]) -> None:
    """The lane tells of a death before membership does."""
    with DenseCluster(folder, Shape(attention_workers=2)) as cluster:
        submission = started(cluster)
        cluster.kill_worker(cluster.listener.output(submission).maps[-1][0].worker)
        assert cluster.listener.wait(submission).token_ids == expected
        cluster.tell()


def test_the_only_worker_dies_and_its_successor_takes_over(folder: Path, expected: list[int]) -> None:
    """With no attention worker left a stream pauses; it goes on when another life of the worker joins."""
    with DenseCluster(folder, Shape(attention_workers=1)) as cluster:
        submission = started(cluster)
        worker = WorkerId("attention-0")
        cluster.kill_worker(worker)
        cluster.tell()
        wait_until(lambda: counted(cluster.engine, RECOMPUTED) > 0)
        cluster.start_worker(worker)
        cluster.tell()
        assert cluster.listener.wait(submission).token_ids == expected


@pytest.mark.parametrize("is_known", [True, False], ids=["where it ran", "at another dense worker"])
def test_what_is_taken_over_while_a_worker_is_missing_waits_for_it(
    is_known: bool, folder: Path, expected: list[int]
) -> None:
    """A sequence needs both workers, and is taken over while one of them is restarted: it fitted once, so it
    waits. A new one that needs as much is refused, and hears that it may be worth to try again.
    """
    with DenseCluster(folder, Shape(attention_workers=2, worker_blocks=8)) as cluster:
        submission = started(cluster)
        output = cluster.listener.output(submission)
        if not is_known:
            cluster.engine.stop()
            cluster.engine = cluster.new_engine()
            cluster.attach(cluster.engine)
        seen, shard_map = list(output.token_ids), output.maps[-1]
        worker = WorkerId("attention-1")
        cluster.kill_worker(worker)
        cluster.tell()
        resumed = cluster.submit(
            request(PROMPT, COUNT, key=submission.key, generation=2, output=seen, shard_map=shard_map)
        )
        (new,) = cluster.generate([request(PROMPT, COUNT)])
        assert isinstance(new.failure, ResourceExhausted)
        assert new.failure.message.endswith("retry later")
        cluster.start_worker(worker)
        cluster.tell()
        assert cluster.listener.wait(resumed).token_ids == expected
        cluster.wait_all_free()


def test_a_broken_lane_is_opened_again(folder: Path, expected: list[int]) -> None:
    """A connection breaks though its worker lives: it is opened again, under another generation the lost
    positions are computed again there, and the stream goes on.
    """
    with DenseCluster(folder, Shape(attention_workers=1, transports=("tcp",))) as cluster:
        submission = started(cluster)
        cluster.lanes[-1].link.close()
        assert cluster.listener.wait(submission).token_ids == expected
        assert len(cluster.lanes) == 2


def test_a_frozen_worker_is_given_up_at_the_lane_deadline(folder: Path, expected: list[int]) -> None:
    """A worker that stops answering without dying costs one lane deadline; then its part is computed again
    onto the other one.
    """
    overrides = {"lanes": {"deadline_floor_ms": 200}, "attention": {"lease_ms": 1000}}
    with DenseCluster(folder, Shape(attention_workers=2, overrides=overrides)) as cluster:
        submission = started(cluster)
        frozen = cluster.listener.output(submission).maps[-1][0].worker
        with cluster.workers[frozen].core.store.turns:
            began_s = monotonic()
            assert cluster.listener.wait(submission).token_ids == expected
            assert monotonic() - began_s < 10
        cluster.wait_all_free()


@pytest.mark.parametrize("transport", ["local", "tcp", "grpc"])
def test_a_frozen_worker_is_given_up_when_membership_says_so(
    transport: str, folder: Path, expected: list[int]
) -> None:
    """A worker hangs, and the lane's deadline is far: the step that waits for it ends as soon as membership
    names it no more.
    """
    overrides = {"lanes": {"deadline_floor_ms": 300_000}, "attention": {"lease_ms": 1000}}
    shape = Shape(attention_workers=2, transports=(transport,), overrides=overrides)
    with DenseCluster(folder, shape) as cluster:
        submission = started(cluster)
        frozen = cluster.listener.output(submission).maps[-1][0].worker
        others = [member for member in cluster.members() if member.worker != frozen]
        turns = cluster.workers[frozen].core.store.turns
        with turns:
            wait_until(lambda: turns.waiting > 0)
            cluster.engine.pool.update(others)
            assert cluster.listener.wait(submission).token_ids == expected
        cluster.wait_all_free()


def test_a_message_that_no_lane_carries_is_not_the_workers_fault(
    folder: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense worker cannot pack its own message: the step's sequences end with an internal error, once and
    for all; the lane stays, and serves the next sequence.
    """

    def refuse(_message: LayerMessage) -> None:
        raise InvalidRequest("a STEP frame exceeds the lane's limits")

    with DenseCluster(folder, Shape(attention_workers=1)) as cluster:
        submission = started(cluster)
        (lane,) = cluster.lanes
        with monkeypatch.context() as patched:
            patched.setattr(lane, "send", refuse)
            assert isinstance(cluster.listener.wait(submission).failure, Internal)
        assert cluster.listener.wait(started(cluster)).token_ids == expected
        assert cluster.lanes == [lane]


def test_a_shard_taken_away_is_computed_again(folder: Path, expected: list[int]) -> None:
    """A worker that no longer has a shard says so, and nobody reads what took its place."""
    with DenseCluster(folder, Shape(attention_workers=2)) as cluster:
        submission = started(cluster)
        tail = cluster.listener.output(submission).maps[-1][-1]
        store = cluster.workers[tail.worker].core.store
        (held, *_) = store.locate(submission.key)
        store.release(submission.key, held.generation)
        assert cluster.listener.wait(submission).token_ids == expected
        assert counted(cluster.engine, RECOMPUTED) > 0


def test_other_sequences_lose_nothing_when_one_shard_is_gone(folder: Path) -> None:
    """A fault about one sequence's shard repeats the step for the others: their shards stay."""
    prompts = [random_prompt(40, n) for n in range(4)]
    with DenseCluster(folder, Shape(attention_workers=1)) as cluster:
        expected = [output.token_ids for output in cluster.generate(request(p, 60) for p in prompts)]
        submissions = [cluster.submit(request(prompt, 60)) for prompt in prompts]
        for submission in submissions:
            cluster.listener.wait(submission, some)
        store = cluster.workers[WorkerId("attention-0")].core.store
        (held, *_) = store.locate(submissions[2].key)
        store.release(submissions[2].key, held.generation)
        outputs = [cluster.listener.wait(submission) for submission in submissions]
        assert [output.token_ids for output in outputs] == expected
        assert counted(cluster.engine, RECOMPUTED) <= 40 + 60


def test_another_dense_worker_takes_over_without_recomputing(folder: Path, expected: list[int]) -> None:
    """The dense worker dies; another one adopts the living shards: not one prompt token is computed again."""
    with DenseCluster(folder, Shape(attention_workers=3)) as cluster:
        submission = started(cluster)
        cluster.engine.stop()
        output = cluster.listener.output(submission)
        seen = list(output.token_ids)
        cluster.engine = cluster.new_engine()
        cluster.attach(cluster.engine)
        resumed = request(
            PROMPT, COUNT, key=submission.key, generation=2, output=seen, shard_map=output.maps[-1]
        )
        assert cluster.listener.wait(cluster.submit(resumed)).token_ids == expected
        assert computed_tokens(cluster.engine) <= COUNT - len(seen) + 2
        assert counted(cluster.engine, "anabranch_dense_tokens_adopted") >= len(PROMPT)


def test_a_take_over_back_finds_what_came_since(folder: Path) -> None:
    """A sequence goes to another dense worker, grows there onto further workers, and comes back to the first,
    which still has its early life in mind: what came since is found, and not computed again.
    """
    prompt = random_prompt(10, 5)
    with DenseCluster(folder, Shape(attention_workers=3)) as cluster:
        (whole,) = cluster.generate([request(prompt, COUNT)])
        first, other = cluster.engine, cluster.new_engine()
        cluster.attach(other)
        cluster.listener.acknowledges = False  # the end of its early life is not heard of
        early = cluster.submit(request(prompt, 4))
        seen = cluster.listener.wait(early)
        cluster.listener.acknowledges = True
        later = request(
            prompt, COUNT, key=early.key, generation=2, output=seen.token_ids, shard_map=seen.maps[-1]
        )
        cluster.submit(later, other)
        cluster.listener.wait(later, lambda output: len(output.token_ids) >= 100)
        other.stop()
        grown = cluster.listener.output(later)
        assert {shard.worker for shard in grown.maps[-1]} > {shard.worker for shard in seen.maps[-1]}
        before = computed_tokens(first)
        back = request(
            prompt, COUNT, key=early.key, generation=3, output=grown.token_ids, shard_map=grown.maps[-1]
        )
        assert cluster.listener.wait(cluster.submit(back)).token_ids == whole.token_ids
        assert computed_tokens(first) - before <= COUNT - len(back.output) + 2


def test_a_take_over_with_a_map_from_before_a_move_finds_what_moved(
    folder: Path, expected: list[int]
) -> None:
    """A shard moved, and the dense worker died before its gateway heard where to: the next one finds it."""
    with DenseCluster(folder, Shape(attention_workers=6)) as cluster:
        submission = started(cluster)
        before = cluster.listener.output(submission).maps[-1]
        target = next(iter(set(cluster.workers) - {shard.worker for shard in before}))
        cluster.engine.move(submission.key, before[0].worker, target)
        wait_until(lambda: counted(cluster.engine, "anabranch_dense_moves", outcome="done") == 1)
        cluster.engine.stop()
        seen = list(cluster.listener.output(submission).token_ids)
        cluster.engine = cluster.new_engine()
        cluster.attach(cluster.engine)
        resumed = request(PROMPT, COUNT, key=submission.key, generation=2, output=seen, shard_map=before)
        assert cluster.listener.wait(cluster.submit(resumed)).token_ids == expected
        assert computed_tokens(cluster.engine) <= COUNT - len(seen) + 2


def test_a_take_over_without_a_map_finds_the_shards(folder: Path, expected: list[int]) -> None:
    """Without a map every attention worker is asked."""
    with DenseCluster(folder, Shape(attention_workers=3)) as cluster:
        submission = started(cluster)
        cluster.engine.stop()
        seen = list(cluster.listener.output(submission).token_ids)
        cluster.engine = cluster.new_engine()
        cluster.attach(cluster.engine)
        resumed = request(PROMPT, COUNT, key=submission.key, generation=2, output=seen)
        assert cluster.listener.wait(cluster.submit(resumed)).token_ids == expected
        assert computed_tokens(cluster.engine) <= COUNT - len(seen) + 2


def test_a_take_over_with_another_prompt_keeps_nothing_behind_the_difference(folder: Path) -> None:
    """A client resumes with an early token of its prompt changed: later shards lie on other workers and agree
    with its tokens, but were computed behind the other one. Everything from there on is computed again.
    """
    with DenseCluster(folder, Shape(attention_workers=3)) as cluster:
        submission = started(cluster)
        cluster.engine.stop()
        output = cluster.listener.output(submission)
        assert len({shard.worker for shard in output.maps[-1]}) > 1
        seen = list(output.token_ids)
        changed = [*PROMPT[:3], PROMPT[3] + 1, *PROMPT[4:]]
        cluster.engine = cluster.new_engine()
        cluster.attach(cluster.engine)
        resumed = request(
            changed, COUNT, key=submission.key, generation=2, output=seen, shard_map=output.maps[-1]
        )
        tokens = cluster.listener.wait(cluster.submit(resumed)).token_ids
        assert counted(cluster.engine, "anabranch_dense_tokens_adopted") == 3
        afresh = request(changed, COUNT, generation=2, output=seen)
        assert cluster.listener.wait(cluster.submit(afresh)).token_ids == tokens


def test_a_dense_worker_that_was_replaced_is_fenced(folder: Path, expected: list[int]) -> None:
    """Two dense workers believe that they own a sequence: the older generation cannot take another step,
    and its gateway is told; the newer one's tokens are right.
    """
    with DenseCluster(folder, Shape(attention_workers=2)) as cluster:
        submission = started(cluster)
        output = cluster.listener.output(submission)
        resumed = request(
            PROMPT,
            COUNT,
            key=submission.key,
            generation=2,
            output=list(output.token_ids),
            shard_map=output.maps[-1],
        )
        other, listener = cluster.new_engine(), Listener()
        cluster.attach(other)
        try:
            listener.expect(resumed, other)
            other.submit(resumed, listener, 1.0)
            new = listener.wait(resumed)
            old = cluster.listener.wait(submission)
            assert new.finish is FinishReason.LENGTH
            assert new.token_ids == expected
            assert isinstance(old.failure, Fenced)
            assert old.token_ids == expected[: len(old.token_ids)]
            cluster.wait_all_free()
        finally:
            other.stop()


def test_the_end_of_an_earlier_submission_is_not_that_of_the_next(folder: Path, expected: list[int]) -> None:
    """What an attention worker fenced was given to a submission that this one replaced: the sequence goes on.
    A generation of its own lives that was fenced ends it.
    """
    shape = Shape(attention_workers=2, overrides={"attention": {"lease_ms": 1000}})
    with DenseCluster(folder, shape) as cluster:
        for fenced, ends in ((wire_generation(1, 7), False), (wire_generation(2, 0), True)):
            submission = cluster.submit(request(PROMPT, COUNT, generation=2))
            cluster.listener.wait(submission, some)
            cluster.engine.superseded(submission.key, fenced, Fenced("another one runs it"))
            output = cluster.listener.wait(submission)
            assert isinstance(output.failure, Fenced) is ends
            assert ends or output.token_ids == expected
        cluster.wait_all_free()


def test_two_dense_workers_share_attention_workers(folder: Path, expected: list[int]) -> None:
    """Two dense workers over three attention workers serve at once, each with the right tokens."""
    with DenseCluster(folder, Shape(attention_workers=3)) as cluster:
        other = cluster.new_engine()
        cluster.attach(other)
        try:
            submissions = [
                cluster.submit(request(PROMPT, COUNT), engine) for engine in (cluster.engine, other) * 2
            ]
            for submission in submissions:
                assert cluster.listener.wait(submission).token_ids == expected
            cluster.wait_all_free()
        finally:
            other.stop()
