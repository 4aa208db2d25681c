"""The cache is never fetched: what a dense worker receives does not depend on the context's length."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from tests.cluster_harness import DenseCluster, Shape, computed_tokens, counted, request
from tests.models import random_prompt, tiny_model
from workers.lanes.framed import FramedLane
from workers.lanes.sockets import SocketLink

STEPS = 10
FIXED_BYTES = 4096
_RECEIVED_OFFSET = 128
"""tcpi_bytes_received in Linux' struct tcp_info."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a context of 4,096 tokens."""
    return tiny_model(tmp_path_factory.mktemp("long"), max_position_embeddings=4096)


def kernel_received_bytes(lane: FramedLane) -> int:
    """What the kernel says arrived on a lane's TCP connection."""
    assert isinstance(lane.link, SocketLink)
    with socket.socket(fileno=os.dup(lane.link.fileno())) as connection:
        information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    (received,) = struct.unpack_from("<Q", information, _RECEIVED_OFFSET)
    return int(received)


def received_per_step(cluster: DenseCluster, context: int) -> float:
    """Bytes per decode step from both workers, with a sequence of `context` tokens on them."""
    few = request(random_prompt(context, seed=context), 2)
    many = request(random_prompt(context, seed=context), 2 + STEPS)
    figures = []
    for submission in (few, many):
        before = [kernel_received_bytes(lane) for lane in cluster.lanes]
        steps = counted(cluster.engine, "anabranch_dense_steps")
        cluster.generate([submission])
        after = [kernel_received_bytes(lane) for lane in cluster.lanes]
        taken = counted(cluster.engine, "anabranch_dense_steps") - steps
        figures.append((sum(after) - sum(before), taken))
    (few_bytes, few_steps), (many_bytes, many_steps) = figures
    assert many_steps - few_steps == STEPS
    return (many_bytes - few_bytes) / STEPS


def test_a_decode_step_receives_the_same_bytes_at_500_and_3000_tokens(folder: Path) -> None:
    """By the kernel's count, the bytes received per decode step are equal for both contexts, and at most
    layers x rows x query heads x (head size + 2) x 4 + 4 KB from each worker (DESIGN 6b, Never fetched).
    """
    shape = Shape(
        attention_workers=2,
        transports=("tcp",),
        shard_tokens=1600,
        step_tokens=256,
        overrides={"attention": {"prefix_sharing": False}},  # both requests of a context prefill it
    )
    with DenseCluster(folder, shape) as cluster:
        spec = cluster.decoder.spec
        bound = spec.layers * spec.query_heads * (spec.head_size + 2) * 4 + FIXED_BYTES
        one_worker = received_per_step(cluster, 500)
        assert 0 < one_worker <= bound
        two_workers = received_per_step(cluster, 3000)
        assert two_workers == 2 * one_worker


def test_one_worker_sends_the_same_bytes_at_both_contexts(folder: Path) -> None:
    """With all of either context on one worker the bytes received per decode step are equal to the byte."""
    shape = Shape(
        attention_workers=1,
        transports=("tcp",),
        worker_blocks=256,
        step_tokens=256,
        overrides={"attention": {"prefix_sharing": False}},
    )
    with DenseCluster(folder, shape) as cluster:
        short, long = received_per_step(cluster, 500), received_per_step(cluster, 3000)
        assert short == long > 0


def test_ten_rows_receive_ten_rows(folder: Path) -> None:
    """The bytes grow with the rows of the batch, as the bound does."""
    shape = Shape(attention_workers=1, transports=("tcp",), worker_blocks=1024)
    with DenseCluster(folder, shape) as cluster:
        spec = cluster.decoder.spec
        row_bytes = spec.layers * spec.query_heads * (spec.head_size + 2) * 4
        before = kernel_received_bytes(cluster.lanes[0])
        tokens = computed_tokens(cluster.engine)
        steps = counted(cluster.engine, "anabranch_dense_steps")
        cluster.generate(request(random_prompt(20, n), 12) for n in range(10))
        received = kernel_received_bytes(cluster.lanes[0]) - before
        rows = computed_tokens(cluster.engine) - tokens
        steps = counted(cluster.engine, "anabranch_dense_steps") - steps
        assert received <= rows * row_bytes + steps * FIXED_BYTES
