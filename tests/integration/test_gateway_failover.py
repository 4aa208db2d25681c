"""Dense workers die, drain, refuse and misbehave: no token wrong, missing or repeated."""

import asyncio
import logging
from pathlib import Path

import pytest

from anabranch.v1 import dense_pb2, inference_pb2, types_pb2
from cluster import errors
from tests.fake_dense import LETTER_IDS, FakeDense
from tests.gateways import (
    asynchronous,
    completion,
    eventually,
    expected_letters,
    fleet,
    generate,
)
from workers.gateway.gateway import Gateway


@asynchronous
async def test_a_stream_survives_its_dense_worker(tmp_path: Path) -> None:
    """A worker dies mid-stream: another gets prompt, tokens so far, seed and map, and continues."""
    first, second = FakeDense("dense-0", pause_at=7), FakeDense("dense-1")
    async with fleet(tmp_path, [first, second]) as cluster:
        stream = asyncio.create_task(generate(cluster.stub(), completion(n=2)))
        await eventually(lambda: len(first.submissions) == 2, "both choices are on the first worker")
        await cluster.lose_dense(first)
        heard = await stream
    for choice in range(2):
        assert heard.tokens(choice) == expected_letters(choice=choice)
        heard.finished(choice)
    for resubmission in second.submissions:
        choice, known = resubmission.sequence.choice, list(resubmission.output_token_ids)
        assert known == expected_letters(choice=choice)[: len(known)]
        assert resubmission.generation > first.submissions[0].generation
        assert resubmission.sampling.seed == heard.started.seed
        assert resubmission.deadline_ms <= first.submissions[0].deadline_ms


@asynchronous
async def test_the_last_shard_map_travels_with_a_resubmission(tmp_path: Path) -> None:
    """Where the KV lies is told to the next worker, and to the client."""
    first, second = FakeDense("dense-0", pause_at=7), FakeDense("dense-1")
    async with fleet(tmp_path, [first]) as cluster:
        call = cluster.stub().Generate(completion(), timeout=20)
        seen: list[int] = []
        maps = []
        async for event in call:
            seen.extend(event.delta.token_ids)
            maps += [event.delta.shard_map] if event.delta.HasField("shard_map") else []
            if len(seen) == 7:
                break
        await cluster.add_dense(second)
        await cluster.lose_dense(first)
        await eventually(lambda: len(second.submissions) == 1, "resubmitted")
        call.cancel()
    assert len(maps) == 1
    assert second.submissions[0].shard_map == maps[0]
    assert list(second.submissions[0].output_token_ids) == seen == expected_letters()[:7]


@asynchronous
async def test_a_stream_waits_for_a_worker_to_return(tmp_path: Path) -> None:
    """With no other worker left a started stream waits; a new life of the slot continues it."""
    first = FakeDense("dense-0", pause_at=7)
    async with fleet(tmp_path, [first], gateway={"no_worker_wait_ms": 50}) as cluster:
        stream = asyncio.create_task(generate(cluster.stub(), completion()))
        await eventually(lambda: bool(first.submissions), "submitted")
        await first.die()
        await eventually(lambda: not cluster.gateways[0].ready, "the break is noticed")
        cluster.dense.remove(first)
        await cluster.add_dense(FakeDense("dense-0"))
        heard = await stream
    assert heard.tokens() == expected_letters()


@asynchronous
async def test_a_draining_worker_hands_its_sequences_over(tmp_path: Path) -> None:
    """HANDOFF moves sequences elsewhere, and nothing new goes to the worker that said it."""
    first, second = FakeDense("dense-0", pause_at=7), FakeDense("dense-1")
    async with fleet(tmp_path, [first]) as cluster:
        stream = asyncio.create_task(generate(cluster.stub(), completion()))
        await eventually(lambda: bool(first.submissions), "submitted")
        await cluster.add_dense(second)
        await first.hand_over()
        assert (await stream).tokens() == expected_letters()
        assert (await generate(cluster.stub(), completion())).tokens() == expected_letters()
        assert first.acknowledged == []  # an acknowledgement would free what the next worker adopts
    assert len(first.submissions) == 1


async def linked(caplog: pytest.LogCaptureFixture, count: int) -> None:
    """Until so many links to dense workers were opened."""
    await eventually(lambda: caplog.messages.count("link_ready") == count, f"{count} links are open")


@asynchronous
async def test_one_sequence_is_handed_to_the_worker_that_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that stays gives a sequence to another by name, and is given new ones as before."""
    caplog.set_level(logging.INFO)
    first, idle, named = FakeDense("dense-0", pause_at=7), FakeDense("dense-1"), FakeDense("dense-2")
    async with fleet(tmp_path, [first]) as cluster:
        stream = asyncio.create_task(generate(cluster.stub(), completion()))
        await eventually(lambda: bool(first.submissions), "submitted")
        await cluster.add_dense(idle)
        await cluster.add_dense(named)
        await linked(caplog, 3)
        await first.hand_over(worker_stays=True, to="dense-2")
        assert (await stream).tokens() == expected_letters()
        assert (len(idle.submissions), len(named.submissions)) == (0, 1)
        first.pause_at = None
        assert (await generate(cluster.stub(), completion())).tokens() == expected_letters()
    assert len(first.submissions) == 2  # the least loaded by its name


@asynchronous
async def test_a_sequence_for_a_worker_that_is_gone_goes_to_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The name in a handoff is a wish: without that worker any other takes the sequence."""
    caplog.set_level(logging.INFO)
    first, second = FakeDense("dense-0", pause_at=7), FakeDense("dense-1")
    async with fleet(tmp_path, [first]) as cluster:
        stream = asyncio.create_task(generate(cluster.stub(), completion()))
        await eventually(lambda: bool(first.submissions), "submitted")
        await cluster.add_dense(second)
        await linked(caplog, 2)
        await first.hand_over(worker_stays=True, to="dense-9")
        assert (await stream).tokens() == expected_letters()
    assert len(second.submissions) == 1


@asynchronous
async def test_prompts_and_decoding_go_where_they_are_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A new sequence goes to a worker for prompts however loaded, one with tokens to a worker for decoding;
    whoever else there is takes them where that one is lost.
    """
    caplog.set_level(logging.INFO)
    prefill = FakeDense("dense-1", pause_at=2, serving=inference_pb2.SERVING_PREFILL)
    decode = FakeDense("dense-0", serving=inference_pb2.SERVING_DECODE)
    async with fleet(tmp_path, [prefill, decode]) as cluster:
        await linked(caplog, 2)
        streams = [asyncio.create_task(generate(cluster.stub(), completion())) for _ in range(3)]
        await eventually(lambda: prefill.paused == 3, "all begin at the worker for prompts")
        assert decode.submissions == []
        await prefill.hand_over(worker_stays=True)
        for stream in streams:
            assert (await stream).tokens() == expected_letters()
        assert [len(submission.output_token_ids) for submission in decode.submissions] == [2, 2, 2]
        await cluster.lose_dense(prefill)
        assert (await generate(cluster.stub(), completion())).tokens() == expected_letters()
    assert len(decode.submissions) == 4


@asynchronous
async def test_an_unavailable_worker_is_left_for_another(tmp_path: Path) -> None:
    """UNAVAILABLE from one worker is retried on the other, unseen by the client."""
    refusing = FakeDense("dense-0", refusal=errors.Unavailable("draining"))
    async with fleet(tmp_path, [refusing, FakeDense("dense-1")]) as cluster:
        assert (await generate(cluster.stub(), completion())).tokens() == expected_letters()
    assert len(refusing.submissions) == 1


@asynchronous
async def test_a_full_worker_is_left_for_another_and_then_said(tmp_path: Path) -> None:
    """RESOURCE_EXHAUSTED of every worker reaches the client, with the worker's own words."""
    full = errors.ResourceExhausted("queue full")
    workers = [FakeDense("dense-0", refusal=full), FakeDense("dense-1", refusal=full)]
    async with fleet(tmp_path, workers) as cluster:
        with pytest.raises(errors.ResourceExhausted, match="queue full"):
            await generate(cluster.stub(), completion())
        workers[1].refusal = None
        assert (await generate(cluster.stub(), completion())).tokens() == expected_letters()


@asynchronous
async def test_other_failures_end_the_request_everywhere(tmp_path: Path) -> None:
    """A failure that retrying does not cure ends the request, its other choices too."""
    worker = FakeDense("dense-0", pause_at=3)
    async with fleet(tmp_path, [worker]) as cluster:
        stream = asyncio.create_task(generate(cluster.stub(), completion(n=2)))
        await eventually(lambda: len(worker.submissions) == 2, "submitted")
        failed = worker.submissions[0]
        error = errors.InvalidRequest("this cannot be")
        failure = types_pb2.Failure(code=3, reason=error.reason, message=error.message)
        await worker.send(
            dense_pb2.SequenceDelta(sequence=failed.sequence, generation=failed.generation, failure=failure)
        )
        with pytest.raises(errors.InvalidRequest, match="this cannot be"):
            await stream
        await eventually(lambda: len(worker.aborts) == 1, "the other choice is aborted")
    assert worker.aborts[0].sequence.choice == 1


@asynchronous
async def test_without_any_worker_a_new_request_fails_soon(tmp_path: Path) -> None:
    """UNAVAILABLE after the configured wait; a worker that comes within it serves."""
    async with fleet(tmp_path, gateway={"no_worker_wait_ms": 100}) as cluster:
        with pytest.raises(errors.Unavailable, match="no dense worker"):
            await generate(cluster.stub(), completion())
    async with fleet(tmp_path) as cluster:
        stream = asyncio.create_task(generate(cluster.stub(), completion()))
        await eventually(lambda: cluster.gateways[0].desk.streams_open == 1, "the request waits")
        await cluster.add_dense(FakeDense("dense-0"))
        assert (await stream).tokens() == expected_letters()


@asynchronous
async def test_repeated_and_stale_deltas_are_dropped(tmp_path: Path) -> None:
    """Of a delta only what is next counts; one of another generation counts not at all."""
    worker = FakeDense("dense-0", pause_at=5)
    async with fleet(tmp_path, [worker]) as cluster:
        stream = asyncio.create_task(generate(cluster.stub(), completion(max_tokens=20)))
        await eventually(lambda: bool(worker.submissions), "submitted")
        running = worker.submissions[0]
        wrong = [LETTER_IDS[0]] * 3
        stale = dense_pb2.SequenceDelta(
            sequence=running.sequence, generation=running.generation - 1, first_index=5, token_ids=wrong
        )
        await worker.send(stale)
        repeated = dense_pb2.SequenceDelta(
            sequence=running.sequence, generation=running.generation, first_index=0, token_ids=wrong[:1]
        )
        await eventually(lambda: _delivered(cluster.gateways[0]) >= 1, "a token came")
        await worker.send(repeated)
        worker.pause_at = None
        heard = await stream
    assert heard.tokens() == expected_letters()


@asynchronous
async def test_lost_tokens_are_asked_for_again(tmp_path: Path) -> None:
    """A delta that starts after the next index shows a loss: the sequence is resubmitted from there."""
    worker = FakeDense("dense-0", pause_at=5)
    async with fleet(tmp_path, [worker]) as cluster:
        stream = asyncio.create_task(generate(cluster.stub(), completion(max_tokens=20)))
        await eventually(lambda: bool(worker.submissions), "submitted")
        running = worker.submissions[0]
        gap = dense_pb2.SequenceDelta(
            sequence=running.sequence,
            generation=running.generation,
            first_index=19,
            token_ids=[LETTER_IDS[0]],
            finish_reason=types_pb2.FINISH_REASON_LENGTH,
        )
        await worker.send(gap)
        worker.pause_at = None
        heard = await stream
    assert heard.tokens() == expected_letters()
    assert len(worker.submissions) == 2


@asynchronous
async def test_new_requests_go_to_the_least_loaded_worker(tmp_path: Path) -> None:
    """Requests spread evenly over workers."""
    workers = [FakeDense("dense-0", pause_at=1), FakeDense("dense-1", pause_at=1)]
    async with fleet(tmp_path, workers) as cluster:
        stub = cluster.stub()
        calls = [stub.Generate(completion(), timeout=20) for _ in range(4)]
        await eventually(lambda: sum(len(worker.submissions) for worker in workers) == 4, "submitted")
        assert [len(worker.submissions) for worker in workers] == [2, 2]
        for call in calls:
            call.cancel()


@asynchronous
async def test_a_member_that_vanishes_keeps_a_working_stream_for_a_while(tmp_path: Path) -> None:
    """A controller that starts again knows nobody for a moment: no stream is cut for that."""
    worker = FakeDense("dense-0", pause_at=3)
    async with fleet(tmp_path, [worker]) as cluster:
        stream = asyncio.create_task(generate(cluster.stub(), completion()))
        await eventually(lambda: bool(worker.submissions), "submitted")
        cluster.dense.remove(worker)
        cluster.tell()
        cluster.dense.append(worker)
        cluster.tell()
        worker.pause_at = None
        assert (await stream).tokens() == expected_letters()
    assert len(worker.submissions) == 1


@asynchronous
async def test_a_member_that_stays_away_is_left(tmp_path: Path) -> None:
    """A worker that is silent, its stream open but frozen, loses its sequences once it is taken for dead."""
    frozen, other = FakeDense("dense-0", pause_at=3), FakeDense("dense-1")
    terms = {"heartbeat_ms": 20, "expiry_ms": 100}
    async with fleet(tmp_path, [frozen], controller=terms) as cluster:
        stream = asyncio.create_task(generate(cluster.stub(), completion()))
        await eventually(lambda: bool(frozen.submissions), "submitted")
        cluster.dense.remove(frozen)
        await cluster.add_dense(other)
        assert (await stream).tokens() == expected_letters()
        await frozen.die()


@asynchronous
async def test_a_lone_worker_s_refusals_are_waited_out(tmp_path: Path) -> None:
    """UNAVAILABLE of the only worker is retried after pauses, until it takes the sequence."""
    worker = FakeDense("dense-0", refusal=errors.Unavailable("no attention worker has joined"))
    async with fleet(tmp_path, [worker]) as cluster:
        stream = asyncio.create_task(generate(cluster.stub(), completion()))
        await eventually(lambda: len(worker.submissions) == 2, "it was retried")
        worker.refusal = None
        assert (await stream).tokens() == expected_letters()
    generations = [submission.generation for submission in worker.submissions]
    assert generations == list(range(1, len(generations) + 1))


@asynchronous
async def test_a_started_stream_outlasts_a_full_queue(tmp_path: Path) -> None:
    """A sequence that has tokens and finds the next worker full is offered again, for a while."""
    first, full = (
        FakeDense("dense-0", pause_at=3),
        FakeDense("dense-1", refusal=errors.ResourceExhausted("full")),
    )
    async with fleet(tmp_path, [first]) as cluster:
        stream = asyncio.create_task(generate(cluster.stub(), completion()))
        await eventually(lambda: _delivered(cluster.gateways[0]) == 3, "three tokens")
        await cluster.add_dense(full)
        await cluster.lose_dense(first)
        await eventually(lambda: len(full.submissions) == 2, "offered twice")
        full.refusal = None
        assert (await stream).tokens() == expected_letters()


@asynchronous
async def test_a_request_that_ends_every_worker_ends_itself(tmp_path: Path) -> None:
    """A sequence under which one worker after the other goes down is given up, long before its deadline."""
    worker = FakeDense("dense-0", hangs_up=True)
    async with fleet(tmp_path, [worker]) as cluster:
        with pytest.raises(errors.Unavailable, match="were lost without a token"):
            await generate(cluster.stub(), completion())
        worker.hangs_up = False
        assert (await generate(cluster.stub(), completion())).tokens() == expected_letters()
    assert len(worker.submissions) == 18


def _delivered(gateway: Gateway) -> float:
    name = "vllm:generation_tokens_total"
    return gateway.metrics.registry.get_sample_value(name, {"model_name": "tiny"}) or 0.0
