"""Prefixes that one dense worker left in the pool are found by another one, through the controller."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from anabranch.v1 import control_pb2, control_pb2_grpc, inference_pb2
from cluster import rpc
from cluster.blocks import BlockHash
from cluster.clock import ManualClock
from cluster.config import SecurityConfig, TlsConfig
from cluster.policies.directory import Life, Run
from cluster.types import LAYOUT_VERSION, WIRE_VERSION, Epoch, SequenceKey, WorkerId
from tests.cluster_harness import (
    WAIT_S,
    DenseCluster,
    Shape,
    assert_continues,
    computed_tokens,
    request,
    wait_until,
)
from tests.models import random_prompt, reference_tokens, tiny_model
from tests.pool_directory import DirectoryController, TwoDenseWorkers
from workers.dense.finder import PrefixFinder

PREFIX = random_prompt(2000, 1)
PREFIX_BLOCKS = 125
TAIL, COUNT = 20, 10
SHAPE = Shape(attention_workers=2, worker_blocks=400, shard_tokens=512, step_tokens=256, max_batch=32)
SHORT = random_prompt(75, 2)


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose context takes the prefix."""
    return tiny_model(tmp_path_factory.mktemp("long"), max_position_embeddings=4096)


def prompts(count: int) -> list[list[int]]:
    """Prompts that agree in `PREFIX`, and in no token behind it."""
    return [[*PREFIX, index + 3, *random_prompt(TAIL - 1, 100 + index)] for index in range(count)]


def test_a_prefix_is_computed_and_held_once_by_two_dense_workers(long_folder: Path) -> None:
    """32 requests over two dense workers agree in 2,000 tokens: after the first has sealed them nobody
    computes them again, the pool holds at most 1.15 copies of them beside the tails, and the tokens are the
    reference's.
    """
    all_prompts = prompts(32)
    with TwoDenseWorkers(long_folder, SHAPE) as pool:
        pool.cluster.listener.acknowledges = False  # what they hold stays, to be counted
        engines = [pool.first, pool.second] * 16
        submitted = [request(prompt, COUNT) for prompt in all_prompts]
        outputs = [pool.generate(submitted[0], engines[0])]
        pool.wait_found(PREFIX, len(PREFIX))
        for submission, engine in zip(submitted[1:], engines[1:], strict=True):
            pool.cluster.submit(submission, engine)
        outputs += [pool.cluster.listener.wait(submission) for submission in submitted[1:]]

        assert [output.cached_tokens for output in outputs] == [0, *[len(PREFIX)] * 31]
        own = TAIL + COUNT - 1
        assert computed_tokens(pool.first) == len(PREFIX) + 16 * own
        assert computed_tokens(pool.second) == 16 * own
        block_bytes = pool.cluster.geometry.block_bytes
        held = sum(most - free for free, most in pool.cluster.free_blocks().values())
        tails = 32 * pool.cluster.geometry.blocks_for(TAIL + COUNT)
        assert held * block_bytes <= (1.15 * PREFIX_BLOCKS + tails) * block_bytes
        for submission, engine in zip(submitted, engines, strict=True):
            engine.acknowledge(submission.key, submission.generation, 1.0)
        pool.cluster.wait_all_free()
    for output, reference in zip(
        outputs[:4], reference_tokens(long_folder, all_prompts[:4], COUNT), strict=True
    ):
        assert_continues(output, reference)


def test_two_tenants_never_share(folder: Path) -> None:
    """What one tenant left is not there for another one, at no dense worker and in no answer of the
    directory.
    """
    with TwoDenseWorkers(folder, Shape(attention_workers=2)) as pool:
        pool.generate(request(SHORT, 4), pool.first)
        pool.wait_found(SHORT, 64)
        assert pool.found(SHORT, "other") == 0
        for engine, tenant in ((pool.first, "other"), (pool.second, "third")):
            other = pool.generate(replace(request(SHORT, 4), tenant=tenant), engine)
            assert other.cached_tokens == 0
            pool.cluster.wait_all_free()
        same = pool.generate(request(SHORT, 4), pool.second)
        assert same.cached_tokens == 64


def test_what_is_known_here_is_completed_by_the_directory(folder: Path) -> None:
    """A dense worker that saw the beginning of a conversation finds what another one computed behind it."""
    onward = [*SHORT[:48], *random_prompt(75, 3)]
    with TwoDenseWorkers(folder, Shape(attention_workers=2)) as pool:
        pool.generate(request(SHORT[:50], 4), pool.second)
        pool.generate(request(onward, 4), pool.first)
        pool.wait_found(onward, 112)
        pool.cluster.wait_all_free()
        output = pool.generate(request([*onward, 5], 4), pool.second)
        assert output.cached_tokens == 112


def test_the_controller_knows_what_sequences_hold(folder: Path) -> None:
    """While a sequence holds blocks the controller's map names it at its workers, with as many blocks as
    these say; when it is gone the map is empty.
    """
    with TwoDenseWorkers(folder, Shape(attention_workers=2)) as pool:
        pool.cluster.listener.acknowledges = False
        submission = request(SHORT, 4)
        pool.generate(submission, pool.first)
        stores = {worker: server.core.store for worker, server in pool.cluster.workers.items()}

        def held() -> dict[WorkerId, dict[SequenceKey, int]]:
            lives = [Life(worker, pool.cluster.epochs[worker]) for worker in stores]
            directory = pool.controller.service.directory
            return {life.worker: dict(directory.sequences_at(life)) for life in lives}

        wait_until(lambda: held() == {worker: store.blocks_held() for worker, store in stores.items()})
        assert sum(blocks for each in held().values() for blocks in each.values()) >= 5
        pool.first.acknowledge(submission.key, submission.generation, 1.0)
        wait_until(lambda: held() == {worker: {} for worker in stores})


def test_requests_go_on_without_the_controller(folder: Path) -> None:
    """While nobody answers, a prefix of another dense worker is computed again, and no token differs."""
    (reference,) = reference_tokens(folder, [SHORT], 8)
    with TwoDenseWorkers(folder, Shape(attention_workers=2)) as pool:
        pool.generate(request(SHORT, 8), pool.first)
        pool.wait_found(SHORT, 64)
        pool.cluster.wait_all_free()
        pool.controller.stop()
        output = pool.generate(request(SHORT, 8), pool.second)
        assert output.cached_tokens == 0
        assert_continues(output, reference)


def test_a_restarted_controller_learns_everything_again(folder: Path) -> None:
    """Another controller at the same address names nothing until the workers have told it all they hold; then
    it names what the first one knew.
    """
    with TwoDenseWorkers(folder, Shape(attention_workers=2)) as pool:
        pool.generate(request(SHORT, 4), pool.first)
        pool.wait_found(SHORT, 64)
        pool.restart_controller()
        asked = PrefixFinder(pool.controller.address, TlsConfig(), timeout_s=10.0)
        expected = pool.hashes(SHORT)
        wait_until(lambda: sum(run.blocks for run in asked.find(expected, 0)) == len(expected))
        asked.close()


def test_what_a_lost_worker_held_is_not_named(folder: Path) -> None:
    """As soon as membership takes a worker for dead, no answer names it, and a sweep forgets what it held."""
    with TwoDenseWorkers(folder, Shape(attention_workers=1)) as pool:
        pool.cluster.listener.acknowledges = False
        submission = request(SHORT, 4)
        pool.generate(submission, pool.first)
        pool.wait_found(SHORT, 64)
        directory = pool.controller.service.directory
        life = Life(WorkerId("attention-0"), pool.cluster.epochs[WorkerId("attention-0")])
        wait_until(lambda: bool(directory.sequences_at(life)))
        pool.controller.table.remove(life.worker)
        assert pool.found(SHORT) == 0
        directory.sweep()
        assert not directory.sequences_at(life)
        pool.first.acknowledge(submission.key, submission.generation, 1.0)
        pool.cluster.wait_all_free()


@pytest.mark.parametrize("epoch", ["living", "past"])
def test_a_wrong_hint_costs_a_call_and_no_token(epoch: str, folder: Path) -> None:
    """A directory that names a worker that holds nothing, or a life that is over, changes nothing."""
    (reference,) = reference_tokens(folder, [SHORT], 8)
    named: list[Life] = []

    def find(hashes: Sequence[bytes], blocks_before: int) -> tuple[Run, ...]:
        return (Run(len(hashes), tuple(named)),)

    with DenseCluster(folder, Shape(attention_workers=2), find) as cluster:
        worker = WorkerId("attention-1")
        named.append(Life(worker, cluster.epochs[worker] if epoch == "living" else Epoch(1)))
        (output,) = cluster.generate([request(SHORT, 8)])
        assert output.cached_tokens == 0
        assert_continues(output, reference)


def test_a_controller_that_does_not_answer_is_left_alone() -> None:
    """After a failed call none is made for a second, then for two; one that is answered ends that."""
    clock = ManualClock()
    controller = DirectoryController()
    finder = PrefixFinder(controller.address, TlsConfig(), clock, timeout_s=5.0)
    hashes = [BlockHash(b"x" * 32)]
    controller.stop()
    assert finder.find(hashes, 0) == ()
    assert finder.is_paused
    clock.advance(1.01)
    assert not finder.is_paused
    assert finder.find(hashes, 0) == ()
    clock.advance(1.01)
    assert finder.is_paused
    clock.advance(1.0)
    assert not finder.is_paused
    finder.close()


class MuteController(control_pb2_grpc.ControlServiceServicer):
    """Takes a question, and keeps whoever asked waiting."""

    def __init__(self) -> None:
        self.asked, self.going_on = threading.Event(), threading.Event()

    def FindPrefix(
        self, _request: control_pb2.FindPrefixRequest, _context: grpc.ServicerContext
    ) -> control_pb2.FindPrefixResponse:
        """See control.proto."""
        self.asked.set()
        self.going_on.wait(WAIT_S)
        return control_pb2.FindPrefixResponse()


@contextmanager
def mute_controller() -> Iterator[tuple[MuteController, str]]:
    """It, and where it listens."""
    controller, server = MuteController(), rpc.server(2)
    control_pb2_grpc.add_ControlServiceServicer_to_server(controller, server)
    port = rpc.bind(server, "127.0.0.1", 0, SecurityConfig())
    server.start()
    try:
        yield controller, f"127.0.0.1:{port}"
    finally:
        controller.going_on.set()
        server.stop(grace=None).wait(WAIT_S)


def test_a_finder_goes_where_the_controller_is() -> None:
    """A call under way when the controller's place changes finds nothing and is no failure; the next one is
    asked at the new place, at once, even if the last one was left alone. After the end nothing is found.
    """
    hashes = [BlockHash(b"x" * 32)]
    controller, clock = DirectoryController(), ManualClock()
    with mute_controller() as (mute, address), futures.ThreadPoolExecutor(1) as pool:
        finder = PrefixFinder(address, TlsConfig(), clock, timeout_s=WAIT_S)
        under_way = pool.submit(finder.find, hashes, 0)
        assert mute.asked.wait(WAIT_S)
        finder.follow(controller.address)
        assert under_way.result(WAIT_S) == ()
        assert not finder.is_paused
        joined_holding(controller, hashes)
        assert [run.blocks for run in finder.find(hashes, 0)] == [1]
        finder.follow("127.0.0.1:9")
        assert finder.find(hashes, 0) == ()
        assert finder.is_paused
        finder.follow(controller.address)
        assert [run.blocks for run in finder.find(hashes, 0)] == [1]
        finder.close()
        assert finder.find(hashes, 0) == ()
    controller.stop()


def joined_holding(controller: DirectoryController, hashes: Sequence[BlockHash]) -> None:
    """An attention worker joins and says that it holds these blocks."""
    member = inference_pb2.Member(
        worker_id="attention-0", role=inference_pb2.ROLE_ATTENTION, epoch=7, address="127.0.0.1:9"
    )
    register = control_pb2.RegisterRequest(
        member=member,
        wire_version=WIRE_VERSION,
        layout_version=LAYOUT_VERSION,
        config_digest=controller.config.digest,
    )
    controller.table.register(register)
    published = [control_pb2.SealedBlock(hash=each, prefix_blocks=1) for each in hashes]
    report = control_pb2.PoolReport(number=1, starts_over=True, published=published)
    beat = control_pb2.HeartbeatRequest(worker_id="attention-0", epoch=7, pool=report)
    assert controller.service.directory.take(beat)
