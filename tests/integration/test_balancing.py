"""The controller plans moves from what members report, and dense workers carry them out."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from anabranch.v1 import control_pb2, inference_pb2
from cluster import config as configuration
from cluster.types import WorkerId, draw_epoch
from controller.balancer import BalancerSettings
from tests.cluster_harness import (
    DenseCluster,
    Output,
    Shape,
    assert_continues,
    counted,
    decoder_of,
    request,
    wait_until,
)
from tests.models import Reference, random_prompt, reference_tokens
from tests.pace import slowly
from tests.pool_directory import DirectoryController, joined
from workers.dense.prefixes import BlockChain
from workers.dense.worker import DenseWorker
from workers.membership import MembershipClient
from workers.role import RoleContext

PROMPT = random_prompt(120, 1)
COUNT = 380
SHAPE = Shape(attention_workers=2, worker_blocks=16, shard_tokens=48)
SETTINGS = BalancerSettings(block_tokens=SHAPE.block_tokens, interval_s=0.05)
THIRD = WorkerId("attention-2")


@pytest.fixture(name="expected", scope="module")
def _expected(folder: Path) -> Reference:
    (reference,) = reference_tokens(folder, [PROMPT], COUNT)
    return reference


class Balanced:
    """A pool under a controller that plans, and a dense worker that is a member as its process would be."""

    def __init__(self, folder: Path, settings: BalancerSettings, shape: Shape = SHAPE) -> None:
        self._stack = contextlib.ExitStack()
        self.controller = DirectoryController(balancing=settings)
        self._stack.callback(self.controller.stop)
        self.cluster = DenseCluster(folder, shape)
        self.dense = DenseWorker(self.cluster.config, decoder_of(folder), WorkerId("dense-0"), draw_epoch())

    def __enter__(self) -> Balanced:
        self._stack.enter_context(self.cluster)
        self._stack.callback(self.dense.stop)
        self.dense.start()
        for worker in self.cluster.workers:
            self.join(worker).set_state(inference_pb2.MEMBER_STATE_READY)
        config, address = self.controller.config, self.controller.address
        client = MembershipClient(
            RoleContext("dense", config, WorkerId("dense-0"), 0, draw_epoch(), address),
            inference_pb2.ROLE_DENSE,
            f"127.0.0.1:{self.dense.port}",
            self.dense.load,
            on_change=lambda membership: self.dense.set_members(membership.members),
            on_fenced=lambda: None,
        )
        client.start()
        client.set_mover(self.dense.move)
        client.set_state(inference_pb2.MEMBER_STATE_READY)
        self._stack.callback(client.close)
        wait_until(lambda: all(map(self._is_connected, self.cluster.workers)))
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def join(self, worker: WorkerId) -> MembershipClient:
        """An attention worker becomes a member that nobody uses before it says that it is ready."""
        client = joined(self.controller, self.cluster, worker)
        self._stack.callback(client.close)
        return client

    @property
    def moved(self) -> float:
        """Tokens that moved, after another look of the controller."""
        self.controller.service.sweep()
        return counted(self.dense.engine, "anabranch_dense_tokens_moved")

    def holders(self, token_ids: Sequence[int]) -> set[str]:
        """Who holds the first blocks of these tokens, after another look of the controller."""
        self.controller.service.sweep()
        chain = BlockChain(self.cluster.geometry, "tenant")
        chain.grow(token_ids)
        runs = self.controller.service.directory.find(
            control_pb2.FindPrefixRequest(block_hashes=chain.hashes)
        )
        return {holder.worker_id for run in itertools.islice(runs, 1) for holder in run.holders}

    def _is_connected(self, worker: WorkerId) -> bool:
        return self.dense.engine.leads_to(worker, self.cluster.epochs[worker])


def some(output: Output) -> bool:
    """A few tokens came."""
    return len(output.token_ids) >= 5


def test_a_worker_that_joins_is_given_its_part(folder: Path, expected: Reference) -> None:
    """Two workers are half full when a third one joins: cache moves there while its sequence decodes, and the
    tokens are the reference's.
    """
    with Balanced(folder, SETTINGS) as pool:
        pool.cluster.start_worker(THIRD)
        third = pool.join(THIRD)
        with slowly(pool.dense.engine):
            submission = pool.cluster.submit(request(PROMPT, COUNT), pool.dense.engine)
            output = pool.cluster.listener.wait(submission, some)
            assert pool.moved == 0
            third.set_state(inference_pb2.MEMBER_STATE_READY)
            wait_until(lambda: pool.moved > 0)
        assert_continues(pool.cluster.listener.wait(submission), expected)
        assert any(shard.worker == THIRD for shards in output.maps for shard in shards)


def test_an_even_pool_is_left_alone(folder: Path, expected: Reference) -> None:
    """Where arenas are about as full nothing moves, however often the controller looks."""
    with Balanced(folder, SETTINGS, replace(SHAPE, worker_blocks=64)) as pool:
        submission = pool.cluster.submit(request(PROMPT, COUNT), pool.dense.engine)
        output = pool.cluster.listener.output(submission)
        wait_until(lambda: pool.moved >= 0 and output.is_over)
        assert_continues(output, expected)
        assert pool.moved == 0


def test_hot_blocks_are_replicated(folder: Path) -> None:
    """Eight sequences read the same prefix at one worker; some of them move to the idle one. The prefix is
    copied there once, it is found at both from then on, and the tokens are the reference's.
    """
    prefix = PROMPT[:96]
    prompts = [[*prefix, *random_prompt(8, 10 + index)] for index in range(8)]
    references = reference_tokens(folder, prompts, COUNT)
    shape = replace(SHAPE, worker_blocks=260, shard_tokens=1024)
    with Balanced(folder, SETTINGS, shape) as pool:
        outputs = []
        with slowly(pool.dense.engine):
            for prompt in prompts:
                submission = pool.cluster.submit(request(prompt, COUNT), pool.dense.engine)
                outputs.append(pool.cluster.listener.wait(submission, some))
            wait_until(lambda: len(pool.holders(prefix)) == 2)
        wait_until(lambda: all(each.is_over for each in outputs))
    for output, reference in zip(outputs, references, strict=True):
        assert_continues(output, reference)


def test_no_interval_plans_nothing(folder: Path, expected: Reference) -> None:
    """`placement.plan_interval_s: 0`: a worker that joins gets new sequences only."""
    with Balanced(folder, replace(SETTINGS, interval_s=0.0)) as pool:
        pool.cluster.start_worker(THIRD)
        third = pool.join(THIRD)
        submission = pool.cluster.submit(request(PROMPT, COUNT), pool.dense.engine)
        output = pool.cluster.listener.wait(submission, some)
        third.set_state(inference_pb2.MEMBER_STATE_READY)
        wait_until(lambda: pool.moved >= 0 and output.is_over)
        assert_continues(output, expected)
        assert pool.moved == 0


@pytest.mark.parametrize(
    ("overrides", "homes", "interval_s", "may_lend"),
    [
        ({}, 0, 2.0, True),
        ({"placement.instances": "borrowing", "dense.replicas": 3}, 3, 2.0, True),
        ({"placement.instances": "separate", "dense.replicas": 3}, 3, 2.0, False),
        ({"placement.plan_interval_s": 0}, 0, 0.0, True),
    ],
)
def test_the_configuration_says_who_may_give_to_whom(
    overrides: dict[str, object], homes: int, interval_s: float, may_lend: bool
) -> None:
    """Shared arenas have no home; separate instances give nothing to others: nobody else attends there."""
    settings = BalancerSettings.of(configuration.load(None, {"model.path": "any", **overrides}))
    assert (settings.homes, settings.interval_s, settings.may_lend) == (homes, interval_s, may_lend)
