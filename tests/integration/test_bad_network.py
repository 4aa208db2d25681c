"""Lanes and moves over a network that delays, drops, swallows, corrupts and scrambles.

What is harmed is never served, and every token is the reference's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.types import WorkerId
from tests.cluster_harness import (
    DenseCluster,
    Output,
    Shape,
    assert_continues,
    counted,
    request,
    wait_until,
)
from tests.listening import tcp_ports
from tests.misbehaving_proxy import PROXY_HOST, Manner, MisbehavingProxy
from tests.models import Reference, random_prompt, reference_tokens
from workers.dense.members import AttentionMember

pytestmark = pytest.mark.system  # many processes: minutes rather than seconds

PROMPT = random_prompt(75, 1)
COUNT = 120
FIRST, SECOND = (WorkerId(f"attention-{index}") for index in range(2))
SHAPE = Shape(
    attention_workers=2,
    transports=("tcp",),
    overrides={"lanes": {"deadline_floor_ms": 300}, "placement": {"move_tokens": 64}},
)
HARMED = 3

ABORTED = "anabranch_dense_steps_aborted"
MOVES = "anabranch_dense_moves"


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    """What transformers says after `PROMPT`."""
    (found,) = reference_tokens(folder, [PROMPT], COUNT)
    return found


class ProxiedCluster(DenseCluster):
    """A cluster whose attention workers are reached through proxies, their lanes over TCP included."""

    def members(self) -> list[AttentionMember]:
        """What membership would say, with the proxies' host."""
        return [
            replace(member, address=member.address.replace("127.0.0.1", PROXY_HOST))
            for member in super().members()
        ]


@contextmanager
def proxied(folder: Path) -> Iterator[tuple[ProxiedCluster, dict[int, MisbehavingProxy]]]:
    """A cluster, and its proxies by port: two of each worker, for its calls and for its lanes."""
    before = set(tcp_ports(os.getpid()))
    cluster = ProxiedCluster(folder, SHAPE)
    with ExitStack() as stack:
        ports = set(tcp_ports(os.getpid())) - before
        assert len(ports) == 2 * SHAPE.attention_workers
        proxies = {port: stack.enter_context(MisbehavingProxy(port)) for port in ports}
        with cluster:
            yield cluster, proxies


def some(output: Output) -> bool:
    """A few tokens came."""
    return len(output.token_ids) >= 5


@pytest.mark.parametrize("manner", ["delay", "drop", "blackhole", "corrupt", "reorder"])
def test_what_is_harmed_on_a_lane_is_never_served(manner: Manner, folder: Path, reference: Reference) -> None:
    """Replies suffer in the middle of a stream. What is late is waited for; all else breaks the lane, the
    step counts for nothing and is repeated: the tokens are the reference's, and no block leaks.
    """
    with proxied(folder) as (cluster, proxies):
        calls = {server.port for server in cluster.workers.values()}
        lanes = [proxy for port, proxy in proxies.items() if port not in calls]
        submission = cluster.submit(request(PROMPT, COUNT))
        cluster.listener.wait(submission, some)
        for proxy in lanes:
            proxy.misbehave(manner, HARMED)
        output = cluster.listener.wait(submission)
        assert_continues(output, reference)
        assert sum(proxy.harmed for proxy in lanes) >= HARMED
        assert (counted(cluster.engine, ABORTED) > 0) == (manner != "delay")
        cluster.wait_all_free()


def test_what_is_harmed_on_a_move_is_never_kept(folder: Path, reference: Reference) -> None:
    """A bit of a shard's copy is another on its way: the target refuses the piece by its checksum, the move
    is given up, and the sequence goes on where it was, with the reference's tokens.
    """
    with proxied(folder) as (cluster, proxies):
        submission = cluster.submit(request(PROMPT, COUNT))
        cluster.listener.wait(submission, some)
        source = proxies[cluster.workers[FIRST].port]
        source.misbehave("corrupt", 1, least_bytes=4096)  # keys and values: no other answer is so large
        cluster.engine.move(submission.key, FIRST, SECOND)
        wait_until(lambda: counted(cluster.engine, MOVES, outcome="given_up") == 1)
        assert source.harmed == 1
        assert_continues(cluster.listener.wait(submission), reference)
        assert counted(cluster.engine, MOVES, outcome="done") == 0
        cluster.wait_all_free()
