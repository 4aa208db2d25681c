"""Streams that are continued through another gateway, or at the same one with a higher generation."""

import asyncio
from pathlib import Path

import pytest

from anabranch.v1 import inference_pb2
from cluster import errors
from tests.fake_dense import FakeDense
from tests.gateways import (
    SEED,
    TOKENIZER,
    asynchronous,
    completion,
    eventually,
    expected_letters,
    fleet,
    generate,
)


@asynchronous
async def test_a_stream_resumes_through_a_second_gateway(tmp_path: Path) -> None:
    """What the client holds of a broken stream is continued elsewhere: each index once, text seamless."""
    worker = FakeDense("dense-0", pause_at=7)
    async with fleet(tmp_path, [worker], gateways=2) as cluster:
        first = cluster.stub().Generate(completion(request_id="moving"), timeout=20)
        tokens: list[int] = []
        text, seed = "", 0
        async for event in first:
            seed = event.started.seed or seed
            tokens.extend(event.delta.token_ids)
            text += event.delta.text
            if len(tokens) == 7:
                break
        worker.pause_at = None
        resumed = completion(
            request_id="moving",
            resume=inference_pb2.Resume(
                generation=2, received=[inference_pb2.TokenPrompt(token_ids=tokens)], seed=seed
            ),
        )
        rest = await generate(cluster.stub(cluster.gateways[1]), resumed)
        first.cancel()
    for event in rest.events:
        if event.HasField("delta"):
            assert event.delta.first_index == len(tokens)
            tokens.extend(event.delta.token_ids)
            text += event.delta.text
    assert tokens == expected_letters()
    assert text == TOKENIZER.decode(expected_letters())
    assert rest.started.generation == 2
    assert worker.submissions[1].generation > worker.submissions[0].generation


@asynchronous
async def test_a_higher_generation_takes_a_live_request_over(tmp_path: Path) -> None:
    """At the same gateway the old stream ends as fenced; without resume the id is taken."""
    worker = FakeDense("dense-0", pause_at=7)
    async with fleet(tmp_path, [worker]) as cluster:
        stub = cluster.stub()
        old = asyncio.create_task(generate(stub, completion(request_id="one")))
        await eventually(lambda: bool(worker.submissions), "submitted")
        with pytest.raises(errors.AlreadyExists):
            await generate(stub, completion(request_id="one"))
        worker.pause_at = None
        received = inference_pb2.TokenPrompt(token_ids=expected_letters()[:2])
        resume = inference_pb2.Resume(generation=2, received=[received], seed=3)
        new = await generate(stub, completion(request_id="one", resume=resume))
        with pytest.raises(errors.Fenced):
            await old
    delta = next(event.delta for event in new.events if event.delta.token_ids)
    assert delta.first_index == 2
    assert new.finished().usage.completion_tokens == 20


@asynchronous
async def test_a_resumed_stream_waits_longer_than_a_new_request(tmp_path: Path) -> None:
    """What has tokens already is not given up while no worker is there: it waits for its deadline."""
    known = expected_letters()[:7]
    resume = inference_pb2.Resume(
        generation=2, received=[inference_pb2.TokenPrompt(token_ids=known)], seed=SEED
    )
    async with fleet(tmp_path, gateway={"no_worker_wait_ms": 50}) as cluster:
        resumed = asyncio.create_task(generate(cluster.stub(), completion(request_id="begun", resume=resume)))
        await eventually(lambda: cluster.gateways[0].desk.streams_open == 1, "the stream waits")
        with pytest.raises(errors.Unavailable, match="no dense worker"):
            await generate(cluster.stub(), completion())
        await cluster.add_dense(FakeDense("dense-0"))
        rest = [token for event in (await resumed).events for token in event.delta.token_ids]
    assert rest == expected_letters()[7:]
