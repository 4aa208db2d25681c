"""Workers for prompts and workers for decoding, of which some are full."""

import asyncio
import logging
from pathlib import Path

import pytest

from anabranch.v1 import inference_pb2
from cluster import errors
from tests.fake_dense import FakeDense
from tests.gateways import asynchronous, completion, eventually, expected_letters, fleet, generate

FULL = errors.ResourceExhausted("full")


def for_prompts(name: str) -> FakeDense:
    """A worker that gives sequences away at their second token, when told to."""
    return FakeDense(name, pause_at=2, serving=inference_pb2.SERVING_PREFILL)


def for_decoding(name: str) -> FakeDense:
    """A worker that decodes."""
    return FakeDense(name, serving=inference_pb2.SERVING_DECODE)


async def linked(caplog: pytest.LogCaptureFixture, count: int) -> None:
    """Until the gateway may choose between so many."""
    await eventually(lambda: caplog.messages.count("link_ready") == count, f"{count} links are open")


@asynchronous
async def test_a_full_worker_for_decoding_is_asked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A sequence is handed over and refused: it is offered there again after a pause, not sent back to the
    worker for prompts.
    """
    prefill, decode = for_prompts("dense-0"), for_decoding("dense-1")
    decode.refusal = FULL
    caplog.set_level(logging.INFO)
    async with fleet(tmp_path, [prefill, decode]) as cluster:
        await linked(caplog, 2)
        stream = asyncio.create_task(generate(cluster.stub(), completion()))
        await eventually(lambda: prefill.paused == 1, "it begins at the worker for prompts")
        await prefill.hand_over(worker_stays=True)
        await eventually(lambda: len(decode.submissions) == 2, "offered twice")
        decode.refusal = None
        assert (await stream).tokens() == expected_letters()
    assert len(prefill.submissions) == 1


@asynchronous
async def test_a_worker_for_prompts_decodes_rather_than_that_nobody_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the worker for decoding stays full, the last offer goes to the one for prompts."""
    prefill, decode = for_prompts("dense-0"), for_decoding("dense-1")
    decode.refusal = FULL
    caplog.set_level(logging.INFO)
    async with fleet(tmp_path, [prefill, decode]) as cluster:
        await linked(caplog, 2)
        stream = asyncio.create_task(generate(cluster.stub(), completion()))
        await eventually(lambda: prefill.paused == 1, "it begins at the worker for prompts")
        prefill.pause_at = None
        await prefill.hand_over(worker_stays=True)
        assert (await stream).tokens() == expected_letters()
    assert (len(prefill.submissions), len(decode.submissions)) == (2, 6)


@pytest.mark.parametrize("full", [1, 2])
@asynchronous
async def test_a_new_sequence_tries_the_workers_for_prompts_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, full: int
) -> None:
    """One of two is full: the other one gets it. Both are: after them whoever there is."""
    workers = [for_prompts("dense-0"), for_prompts("dense-1"), for_decoding("dense-2")]
    for worker in workers:
        worker.pause_at = None
    for worker in workers[:full]:
        worker.refusal = FULL
    caplog.set_level(logging.INFO)
    async with fleet(tmp_path, workers) as cluster:
        await linked(caplog, 3)
        assert (await generate(cluster.stub(), completion())).tokens() == expected_letters()
    assert [len(worker.submissions) for worker in workers] == [1, 1, full - 1]
