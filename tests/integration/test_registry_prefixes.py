"""Real processes: prefixes that are found through the registry while the controller is away, or was."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from anabranch import Client
from anabranch.events import Finished
from anabranch.v1 import control_pb2, control_pb2_grpc, inference_pb2
from cluster import rpc
from cluster.blocks import BlockHash
from cluster.config import TlsConfig
from cluster.policies.directory import HeldBlock, Life
from cluster.registry.interface import Registry
from cluster.registry.opening import open_registry
from cluster.types import Epoch, WorkerId
from tests.controlled import ControlledCluster, await_, controlled
from tests.models import Reference, random_prompt, reference_tokens, tiny_model
from tests.redis_server import BINARY, MISSING, LocalRedis

pytestmark = [pytest.mark.system, pytest.mark.redis, pytest.mark.skipif(BINARY is None, reason=MISSING)]

NEAR_TIE = 1e-3
PROMPTS = [random_prompt(65, seed) for seed in (1, 2, 3)]
SHARED, TOKENS = 64, 24
BLOCKS = (65 + TOKENS - 1) // 8
"""Sealed by one of these requests."""
ROLES = ("attention-0", "attention-1", "dense-0", "gateway-0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return tiny_model(tmp_path_factory.mktemp("tiny"), "llama", tokenizer=True)


@pytest.fixture(scope="module")
def references(model: Path) -> list[Reference]:
    """What transformers says after each prompt."""
    return reference_tokens(model, PROMPTS, TOKENS)


@pytest.fixture
def registry(server: LocalRedis) -> Iterator[Registry]:
    """How the test looks into it."""
    registry = open_registry(server.config(deadline_ms=5000))
    yield registry
    registry.close()


def _cached(client: Client, number: int, reference: Reference) -> int:
    """Generate after a prompt; its tokens are the reference's. Returns how many were found in the pool."""
    stream = client.generate(token_ids=PROMPTS[number], temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    events = list(stream)
    tokens = [token for event in events for token in getattr(event, "token_ids", ())]
    assert len(tokens) == TOKENS
    for token, expected, gap in zip(tokens, reference.tokens, reference.gaps, strict=True):
        if gap < NEAR_TIE:
            break
        assert token == expected
    (finished,) = [event for event in events if isinstance(event, Finished)]
    assert finished.usage is not None
    return finished.usage.cached_tokens


def _kept(registry: Registry, count: int) -> list[HeldBlock]:
    """The copy's blocks, as soon as there are so many."""
    kept: list[HeldBlock] = []

    def has_come() -> bool:
        kept[:] = {block.identity: block for block in chain.from_iterable(registry.read_blocks())}.values()
        return len(kept) == count

    await_(has_come, lambda: f"{len(kept)} blocks, not {count}")
    return sorted(kept, key=lambda block: block.prefix_blocks)


def _write(registry: Registry, blocks: list[HeldBlock]) -> None:
    """Change the copy, as the controller that claimed it last."""
    controller = registry.read().controller
    assert controller is not None
    registry.publish_blocks(controller.epoch, blocks)


def _is_ready(registry: Registry, worker: str) -> bool:
    """Whether who reads the registry hears that it serves."""
    bodies = [record.body for record in registry.read().members if record.worker == worker]
    states = [control_pb2.RegisterRequest.FromString(body).member.state for body in bodies]
    return states == [inference_pb2.MEMBER_STATE_READY]


def _other(block: HeldBlock, lives: dict[str, int]) -> HeldBlock:
    """The same block, said to lie at the attention worker that does not hold it."""
    (held,) = block.holders
    name = {"attention-0": "attention-1", "attention-1": "attention-0"}[held.worker]
    return block._replace(holders=(Life(WorkerId(name), Epoch(lives[name])),))


def test_a_known_prefix_is_found_while_the_controller_is_away(
    model: Path, references: list[Reference], tmp_path: Path, server: LocalRedis, registry: Registry
) -> None:
    """SIGKILL of the controller, and of the dense worker that computed two prompts: another one finds what
    the copy names rightly, computes what it names wrongly, and goes on without it when Redis is killed too.
    All tokens are the reference's.
    """
    with controlled(tmp_path, model, server.config()) as cluster:
        for name in ROLES:
            cluster.launch(name)
        cluster.await_ready(*ROLES)
        with cluster.client("gateway-0") as client:
            assert _cached(client, 0, references[0]) == 0
            first = _kept(registry, BLOCKS)
            assert _cached(client, 1, references[1]) == 0
            _kept(registry, 2 * BLOCKS)
            cluster.launch("dense-1")
            cluster.await_ready(*ROLES, "dense-1")
            await_(lambda: _is_ready(registry, "dense-1"))  # written a heartbeat later
            lives = cluster.epochs()
            cluster.kill("controller")
            cluster.kill("dense-0")
            _write(registry, [_other(block, lives) for block in first])
            assert _cached(client, 0, references[0]) == 0
            assert _cached(client, 1, references[1]) == SHARED
            server.kill()
            assert _cached(client, 2, references[2]) == 0
        assert '"directory_away"' in cluster.log("dense-1")


def _found(cluster: ControlledCluster, blocks: list[HeldBlock]) -> list[tuple[str, int]]:
    """Who holds each of these consecutive blocks, as the controller says."""
    request = control_pb2.FindPrefixRequest(
        block_hashes=[block.identity for block in blocks], blocks_before=blocks[0].prefix_blocks - 1
    )
    with rpc.channel(f"127.0.0.1:{cluster.port}", TlsConfig()) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        runs = stub.FindPrefix(request, timeout=5, wait_for_ready=True).runs
    return [
        (holder.worker_id, holder.epoch) for run in runs for _ in range(run.blocks) for holder in run.holders
    ]


def test_a_restarted_controller_answers_before_it_was_told(
    model: Path, references: list[Reference], tmp_path: Path, server: LocalRedis, registry: Registry
) -> None:
    """SIGKILL of the controller while the attention worker is frozen, so that it cannot report: the next one
    names what that held, and what the copy says beyond. When the worker has reported only the former is named
    and kept.
    """
    roles = ("attention-0", "dense-0", "gateway-0")
    with controlled(tmp_path, model, server.config()) as cluster:
        for name in roles:
            cluster.launch(name)
        cluster.await_ready(*roles)
        holder = ("attention-0", cluster.epochs()["attention-0"])
        with cluster.client("gateway-0") as client:
            _cached(client, 0, references[0])
        blocks = _kept(registry, BLOCKS)
        cluster.kill("controller")
        cluster.signal("attention-0", signal.SIGSTOP)
        false = HeldBlock(BlockHash(bytes(32)), 7, blocks[0].holders)
        _write(registry, [false])
        cluster.start_controller()
        await_(lambda: _found(cluster, blocks) == [holder] * BLOCKS)
        assert _found(cluster, [false]) == [holder]
        assert cluster.log("attention-0").count('"registered"') == 1
        cluster.signal("attention-0", signal.SIGCONT)
        await_(lambda: _found(cluster, [false]) == [])
        await_(lambda: _found(cluster, blocks) == [holder] * BLOCKS)
        assert _kept(registry, BLOCKS) == blocks
