"""An engine that an unforeseen error ends: for everybody else as if its process had died."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from anabranch.v1 import dense_pb2
from cluster.errors import EngineFailed, Internal
from cluster.types import Epoch, WorkerId
from tests.cluster_harness import DenseCluster, Shape, counted
from tests.dense_workers import dense_member, dense_worker
from tests.fake_dense import FakeDense, letters
from tests.gateways import Heard, asynchronous, completion, eventually, expected_letters, fleet, generate
from workers.dense.model import Decoder
from workers.dense.worker import DenseWorker
from workers.gateway.gateway import Gateway

EPOCH = Epoch(1)
TEXT = "as if its process had died " * 4
COUNT = 100


class OutOfMemory:
    """The model's head finds no memory once, when told so, in whichever engine comes next."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._due = threading.Event()
        logits = Decoder.logits

        def failing(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
            if self._due.is_set():
                self._due.clear()
                raise torch.OutOfMemoryError("no memory for one chunk")
            return logits(decoder, hidden)

        monkeypatch.setattr(Decoder, "logits", failing)

    def strike(self) -> None:
        """The next step fails."""
        self._due.set()


def test_an_engine_that_fails_costs_no_token(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two engines runs out of memory in the middle of a step: the other goes on with what it had and
    finds the cache, the tokens are the same, and no client hears of it.
    """
    memory = OutOfMemory(monkeypatch)
    overrides = {"attention": {"lease_ms": 1000, "prefix_sharing": False}}

    @asynchronous
    async def streams(workers: Mapping[WorkerId, DenseWorker]) -> None:
        async with fleet(tmp_path, gateways=0) as members:
            members.others = [dense_member(worker, name, EPOCH) for name, worker in workers.items()]
            gateway = await members.add_gateway()
            await eventually(lambda: gateway.ready, "a link to a dense worker")
            requests = [completion(TEXT, COUNT, n=2), completion(TEXT[1:], COUNT)]
            for request in requests:
                request.sampling.ignore_eos = True
            undisturbed = [await generate(members.stub(), request) for request in requests]
            before = sum(map(_sampled, workers.values()))
            running = [asyncio.create_task(generate(members.stub(), request)) for request in requests]
            await eventually(lambda: sum(map(_sampled, workers.values())) > before + 30, "all are running")
            memory.strike()
            assert [_tokens(await stream) for stream in running] == [_tokens(heard) for heard in undisturbed]

    with (
        DenseCluster(folder, Shape(attention_workers=2, overrides=overrides)) as cluster,
        dense_worker(cluster, folder, WorkerId("dense-0"), EPOCH) as first,
        dense_worker(cluster, folder, WorkerId("dense-1"), EPOCH) as second,
    ):
        streams({WorkerId("dense-0"): first, WorkerId("dense-1"): second})
        failed, other = (first, second) if first.engine.failed.done() else (second, first)
        assert failed.engine.failed.result(0) == "OutOfMemoryError"
        assert not other.engine.failed.done()
        assert counted(other.engine, "anabranch_dense_tokens_adopted") > 0
        failed.drain()
        cluster.wait_all_free()


def _sampled(worker: DenseWorker) -> float:
    return counted(worker.engine, "anabranch_dense_tokens_sampled")


def _tokens(heard: Heard) -> list[list[int]]:
    choices = {event.finished.choice for event in heard.events if event.HasField("finished")}
    return [heard.tokens(choice) for choice in sorted(choices)]


@asynchronous
async def test_a_request_under_which_engines_fail_ends_with_the_reason(tmp_path: Path) -> None:
    """Where engine after engine fails at a request, or the only one does in each of its lives, the request
    ends long before its deadline, and its error says why; others are served.
    """
    last_word = EngineFailed("the engine of dense-0 failed: OutOfMemoryError")
    worker = FakeDense("dense-0", hangs_up=True, last_word=last_word)
    async with fleet(tmp_path, [worker]) as cluster:
        with pytest.raises(Internal, match=r"2 dense workers failed.*OutOfMemoryError"):
            await generate(cluster.stub(), completion())
        assert len(worker.submissions) == 2
        worker.hangs_up = False
        assert (await generate(cluster.stub(), completion())).tokens() == expected_letters()


@asynchronous
async def test_only_failures_without_a_token_between_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A choice that got a token since an engine failed under it goes on after the next failure; one that did
    not ends its request, of which nothing is submitted again.
    """
    caplog.set_level(logging.INFO)
    worker = FakeDense("dense-0", pause_at=0, last_word=EngineFailed("the engine of dense-0 failed"))
    other = FakeDense("dense-1")
    async with fleet(tmp_path, [worker]) as cluster:
        spared = asyncio.create_task(generate(cluster.stub(), completion()))
        await eventually(lambda: len(worker.submissions) == 1, "submitted")
        ended = asyncio.create_task(generate(cluster.stub(), completion("other", n=2)))
        await eventually(lambda: len(worker.submissions) == 3, "all are submitted")
        cause = worker.submissions[1].sequence
        await worker.hang_up()
        await eventually(lambda: len(worker.submissions) == 6, "all are submitted again")
        for submission in worker.submissions[3:]:
            if submission.sequence != cause:
                await worker.send(_first_token(submission))
        await eventually(lambda: _delivered(cluster.gateways[0]) == 2, "the others got a token")
        await cluster.add_dense(other)
        await eventually(lambda: caplog.messages.count("link_ready") == 3, "there is another worker")
        await worker.hang_up()
        with pytest.raises(Internal, match="2 dense workers failed"):
            await ended
        assert (await spared).tokens() == expected_letters()
    assert [len(dense.submissions) for dense in (worker, other)] == [6, 1]


def _first_token(submission: dense_pb2.Submission) -> dense_pb2.SequenceDelta:
    return dense_pb2.SequenceDelta(
        sequence=submission.sequence,
        generation=submission.generation,
        token_ids=[letters(submission, 0) or 0],
    )


def _delivered(gateway: Gateway) -> float:
    name = "vllm:generation_tokens_total"
    return gateway.metrics.registry.get_sample_value(name, {"model_name": "tiny"}) or 0.0
