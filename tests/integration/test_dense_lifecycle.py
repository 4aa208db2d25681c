"""How sequences enter and leave a dense worker, over real attention workers."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NoReturn

import pytest

from cluster.errors import AlreadyExists, DeadlineExceeded, Fenced, ResourceExhausted, Unavailable
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
from workers.dense.deltas import FinishReason, Handoff
from workers.dense.remote_peer import RemotePeer

PROMPT = random_prompt(40, 1)
LONG = 450
"""Tokens enough that a test can act while they are generated."""

TWO = Shape(attention_workers=2)


def some(output: Output) -> bool:
    """A few tokens came."""
    return len(output.token_ids) >= 5


def test_abort_frees_the_blocks_within_a_second(folder: Path) -> None:
    """An abort in the middle of decoding ends the stream's tokens and frees every block in a second."""
    with DenseCluster(folder, TWO) as cluster:
        submission = cluster.submit(request(PROMPT, LONG))
        cluster.listener.wait(submission, some)
        cluster.engine.abort(submission.key, submission.generation, 1.0)
        cluster.wait_all_free(within_s=1.0)
        assert not cluster.listener.output(submission).is_over


def test_an_abort_of_an_earlier_life_is_ignored(folder: Path) -> None:
    """Only the generation that lives, or a later one, can be aborted."""
    with DenseCluster(folder, TWO) as cluster:
        submission = cluster.submit(request(PROMPT, 40, generation=3))
        cluster.engine.abort(submission.key, 2, 1.0)
        assert cluster.listener.wait(submission).finish is FinishReason.LENGTH


def test_a_deadline_ends_a_decoding_sequence(folder: Path) -> None:
    """A sequence whose time is over while it decodes fails DEADLINE_EXCEEDED and frees its blocks."""
    with DenseCluster(folder, TWO) as cluster:
        output = cluster.listener.wait(cluster.submit(request(PROMPT, LONG, deadline_s=0.15)))
        assert isinstance(output.failure, DeadlineExceeded)
        assert 0 < len(output.token_ids) < LONG
        cluster.wait_all_free(within_s=1.0)


def test_a_deadline_ends_a_queued_sequence(folder: Path) -> None:
    """A sequence that never left the queue fails in time, without a token."""
    with DenseCluster(folder, Shape(local_blocks=64, max_batch=1)) as cluster:
        running = cluster.submit(request(PROMPT, LONG))
        cluster.listener.wait(running, some)
        began_s = monotonic()
        queued = cluster.listener.wait(cluster.submit(request(PROMPT, 5, deadline_s=0.1)))
        assert isinstance(queued.failure, DeadlineExceeded)
        assert queued.token_ids == []
        assert monotonic() - began_s < 1.0
        cluster.engine.abort(running.key, 1, 1.0)


def test_a_full_queue_refuses_at_once(folder: Path) -> None:
    """Beyond `dense.max_waiting` a submission is answered RESOURCE_EXHAUSTED; those queued still run."""
    shape = Shape(local_blocks=64, max_batch=1, overrides={"dense": {"max_waiting": 2}})
    with DenseCluster(folder, shape) as cluster:
        running = cluster.submit(request(PROMPT, 100))
        cluster.listener.wait(running, some)
        queued = [cluster.submit(request(PROMPT, 3)) for _ in range(2)]
        refused = cluster.listener.wait(cluster.submit(request(PROMPT, 3)))
        assert isinstance(refused.failure, ResourceExhausted)
        assert "max_waiting" in refused.failure.message
        assert all(cluster.listener.wait(item).finish is FinishReason.LENGTH for item in [running, *queued])


def test_what_can_never_fit_is_refused_at_admission(folder: Path) -> None:
    """A sequence larger than the whole pool fails at once, and the message names both sizes."""
    with DenseCluster(folder, Shape(attention_workers=2, worker_blocks=3, shard_tokens=48)) as cluster:
        output = cluster.listener.wait(cluster.submit(request(PROMPT, 100)))
        assert isinstance(output.failure, ResourceExhausted)
        assert "140" in output.failure.message
        assert "96" in output.failure.message


def test_without_attention_workers_a_submission_is_unavailable(folder: Path) -> None:
    """A dense worker that knows no KV pool says so instead of letting the client wait."""
    with DenseCluster(folder, Shape(attention_workers=1)) as cluster:
        (worker,) = cluster.workers
        cluster.kill_worker(worker)
        cluster.tell()
        output = cluster.listener.wait(cluster.submit(request(PROMPT, 5)))
        assert isinstance(output.failure, Unavailable)


def test_a_live_id_is_not_taken_twice(folder: Path) -> None:
    """The same id under the same generation is ALREADY_EXISTS, and the first goes on undisturbed."""
    with DenseCluster(folder, TWO) as cluster:
        first = cluster.submit(request(PROMPT, 60))
        cluster.listener.wait(first, some)
        other = Listener()
        other.expect(first, cluster.engine)
        cluster.engine.submit(first, other, 1.0)
        assert isinstance(other.wait(first).failure, AlreadyExists)
        assert cluster.listener.wait(first).finish is FinishReason.LENGTH


def test_a_higher_generation_takes_over_in_place(folder: Path) -> None:
    """A resubmission to the same worker fences the earlier stream and goes on: the same tokens, none computed
    twice, and those the gateway had not yet seen delivered again.
    """
    with DenseCluster(folder, TWO) as cluster:
        (expected,) = cluster.generate([request(PROMPT, LONG)])
        first = cluster.submit(request(PROMPT, LONG))
        seen = cluster.listener.wait(first, some).token_ids[:5]
        second = cluster.submit(request(PROMPT, LONG, key=first.key, generation=2, output=seen))
        output = cluster.listener.wait(second)
        assert output.token_ids == expected.token_ids
        assert counted(cluster.engine, "anabranch_dense_tokens_adopted") >= len(PROMPT)


def test_a_take_over_whose_answer_was_lost_begins_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker lets a sequence be taken over, its answer is lost, and the lease ends before anything is asked
    again: the generation is over there then, and the sequence goes on under its next life.
    """
    adopt = RemotePeer.adopt

    def adopt_unheard(peer: RemotePeer, *arguments: Any) -> NoReturn:
        assert adopt(peer, *arguments).shards
        sleep(0.9)  # longer than the lease, and not so long that nobody knows any more
        raise Unavailable("the answer was lost")

    with DenseCluster(
        folder, Shape(attention_workers=1, overrides={"attention": {"lease_ms": 500}})
    ) as cluster:
        (expected,) = cluster.generate([request(PROMPT, LONG)])
        first = cluster.submit(request(PROMPT, LONG))
        seen = cluster.listener.wait(first, some).token_ids[:5]
        monkeypatch.setattr(RemotePeer, "adopt", adopt_unheard)
        second = cluster.submit(request(PROMPT, LONG, key=first.key, generation=2, output=seen))
        output = cluster.listener.wait(second)
        assert output.failure is None, output.failure
        assert output.token_ids == expected.token_ids


def test_another_gateway_takes_over_and_the_first_is_told(folder: Path) -> None:
    """The stream that had the sequence ends with FENCED when another one takes it over."""
    with DenseCluster(folder, TWO) as cluster:
        first = cluster.submit(request(PROMPT, LONG))
        seen = list(cluster.listener.wait(first, some).token_ids)
        other = Listener()
        second = request(PROMPT, LONG, key=first.key, generation=2, output=seen)
        other.expect(second, cluster.engine)
        cluster.engine.submit(second, other, 1.0)
        assert isinstance(cluster.listener.wait(first).failure, Fenced)
        assert len(other.wait(second).token_ids) == LONG


def test_an_output_that_is_complete_ends_at_once(folder: Path) -> None:
    """A resubmission whose tokens are all there is finished without a step."""
    with DenseCluster(folder, TWO) as cluster:
        output = cluster.listener.wait(cluster.submit(request(PROMPT, 3, generation=2, output=[7, 8, 9])))
        assert output.finish is FinishReason.LENGTH
        assert output.token_ids == [7, 8, 9]
        assert counted(cluster.engine, "anabranch_dense_steps") == 0


def test_stop_tokens_end_the_output_and_are_not_delivered(folder: Path) -> None:
    """The first stop token ends the output, is named and not part of it; `min_tokens` masks it."""
    with DenseCluster(folder, TWO) as cluster:
        (free,) = cluster.generate([request(PROMPT, 12)])
        stop = free.token_ids[6]
        first = free.token_ids.index(stop)
        stopped, later = cluster.generate(
            [
                request(PROMPT, 12, stop_token_ids=(stop,)),
                request(PROMPT, 12, stop_token_ids=(stop,), min_tokens=12),
            ]
        )
        assert stopped.finish is FinishReason.STOP
        assert stopped.matched_token_id == stop
        assert stopped.token_ids == free.token_ids[:first]
        assert later.finish is FinishReason.LENGTH
        assert len(later.token_ids) == 12
        assert stop not in later.token_ids


def test_finished_blocks_stay_until_acknowledged(folder: Path) -> None:
    """The shards of a finished sequence are there until its gateway has the end, and then they are freed."""
    with DenseCluster(folder, TWO) as cluster:
        cluster.listener.acknowledges = False
        submission = cluster.submit(request(PROMPT, 5))
        cluster.listener.wait(submission)
        assert any(free < capacity for free, capacity in cluster.free_blocks().values())
        cluster.engine.acknowledge(submission.key, submission.generation, 1.0)
        cluster.wait_all_free(within_s=1.0)


def test_finished_sequences_nobody_acknowledges_are_bounded(folder: Path) -> None:
    """Beyond `dense.max_finished` the oldest finished sequence is freed."""
    shape = Shape(local_blocks=64, overrides={"dense": {"max_finished": 2}})
    with DenseCluster(folder, shape) as cluster:
        cluster.listener.acknowledges = False
        submissions = [cluster.submit(request(random_prompt(3, n), 2)) for n in range(6)]
        for submission in submissions:
            cluster.listener.wait(submission)
        wait_until(lambda: cluster.free_blocks()[WorkerId("dense-0-local")][0] == 62, 1.0)
        for submission in submissions:
            cluster.engine.acknowledge(submission.key, 1, 1.0)
        cluster.wait_all_free(within_s=1.0)


def test_an_orphan_stops_stepping_and_is_left_to_its_lease(folder: Path) -> None:
    """When its gateway's stream breaks a sequence gets no further token, keeps its blocks, and after the
    grace period nobody renews them: they expire.
    """
    overrides = {"dense": {"orphan_grace_ms": 200}, "attention": {"lease_ms": 500}}
    with DenseCluster(folder, Shape(attention_workers=2, overrides=overrides)) as cluster:
        submission = cluster.submit(request(PROMPT, LONG))
        output = cluster.listener.wait(submission, some)
        cluster.engine.disconnect(cluster.listener)
        wait_until(lambda: cluster.engine.sequences_running == 0)
        assert any(free < capacity for free, capacity in cluster.free_blocks().values())
        count = len(output.token_ids)
        cluster.wait_all_free(within_s=3.0)
        assert len(output.token_ids) == count < LONG
        assert cluster.engine.is_idle()


def test_an_orphan_is_resumed_without_recomputing(folder: Path) -> None:
    """A gateway that is back within the grace period gets the rest: same tokens, none computed again."""
    with DenseCluster(folder, TWO) as cluster:
        (expected,) = cluster.generate([request(PROMPT, 200)])
        before = computed_tokens(cluster.engine)
        first = cluster.submit(request(PROMPT, 200))
        cluster.listener.wait(first, some)
        cluster.engine.disconnect(cluster.listener)
        wait_until(lambda: cluster.engine.sequences_running == 0)
        output = cluster.listener.output(first)
        resumed = request(
            PROMPT, 200, key=first.key, generation=2, output=output.token_ids, shard_map=output.maps[-1]
        )
        assert cluster.listener.wait(cluster.submit(resumed)).token_ids == expected.token_ids
        computed = computed_tokens(cluster.engine) - before
        assert computed <= len(PROMPT) + 200 + 1


def test_the_map_is_known_before_the_first_token(folder: Path) -> None:
    """The shard map reaches the gateway before any token, and at the end covers all that was computed."""
    with DenseCluster(folder, Shape(attention_workers=3)) as cluster:
        submission = cluster.submit(request(PROMPT, 30))
        first = cluster.listener.wait(submission, lambda output: bool(output.maps))
        assert first.maps
        output = cluster.listener.wait(submission)
        final = output.maps[-1]
        assert final[0].first == 0
        assert final[-1].end >= len(PROMPT) + 30 - 1
        assert all(one.end == after.first for one, after in pairwise(final))


def test_hand_over_gives_every_sequence_back(folder: Path) -> None:
    """A worker that leaves ends its sequences with `handoff`; another engine takes them over by their map."""
    with DenseCluster(folder, TWO) as cluster:
        (expected,) = cluster.generate([request(PROMPT, 200)])
        first = cluster.submit(request(PROMPT, 200))
        cluster.listener.wait(first, some)
        other = cluster.new_engine()
        cluster.attach(other)
        try:
            cluster.engine.refuse_new()
            refused = cluster.listener.wait(cluster.submit(request(PROMPT, 5)))
            assert isinstance(refused.failure, Unavailable)
            cluster.engine.stop()
            output = cluster.listener.wait(first)
            assert output.handoff == Handoff()
            resumed = request(
                PROMPT, 200, key=first.key, generation=2, output=output.token_ids, shard_map=output.maps[-1]
            )
            assert cluster.listener.wait(cluster.submit(resumed, other)).token_ids == expected.token_ids
            assert computed_tokens(other) <= 200 - len(output.token_ids) + 2
        finally:
            other.stop()


def test_the_log_follows_a_sequence_by_request_and_step(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A sequence's admission and end are one line each, with its request and the steps it ran between."""
    submission = request(PROMPT, 10)
    with caplog.at_level(logging.INFO, "anabranch"), DenseCluster(folder, TWO) as cluster:
        cluster.generate([submission])
    told = {
        record.getMessage(): fields
        for record in caplog.records
        if (fields := getattr(record, "fields", {})).get("request_id") == submission.key.request_id
    }
    assert set(told) == {"admitted", "finished"}
    assert told["finished"]["step"] - told["admitted"]["step"] >= 10
