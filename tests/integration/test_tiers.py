"""Attention workers of two arenas as processes: a request over both, moves between them, and their ends."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from anabranch import Client
from anabranch.v1 import inference_pb2
from tests.attention_worker import wait_until
from tests.models import Reference, random_prompt, reference_tokens, tiny_model
from tests.processes import ProcessCluster, process_cluster

TOKEN_BYTES = 512
BLOCK_TOKENS = 8
BEST_TOKENS, SLOW_TOKENS = 400, 1920
PROMPT = random_prompt(900, seed=43)
COUNT = 700
BEST, SLOW = "attention-0", "attention-0.1"
OTHERS = ("attention-1", "attention-1.1")
WAIT_S = 60.0
Moves = set[tuple[str, str, str]]
"""(request, from, to)"""


@pytest.fixture(name="model", scope="module")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_model(folder, "llama", tokenizer=True, max_position_embeddings=4096)


def reference_of(model: Path, prompt: Sequence[int], count: int) -> Reference:
    """What transformers says, whatever holds the cache."""
    (reference,) = reference_tokens(model, [prompt], count)
    assert reference.sharp_length() == count, "a near-tie would end the comparison: take another seed"
    return reference


@pytest.fixture(name="expected", scope="module")
def _expected(model: Path) -> Reference:
    return reference_of(model, PROMPT, COUNT)


@contextlib.contextmanager
def two_tiers(model: Path, folder: Path, workers: int, **more: Any) -> Iterator[ProcessCluster]:
    """A cluster of workers with a small arena and a larger one behind it."""
    overrides = {
        "attention.replicas": workers,
        "attention.block_tokens": BLOCK_TOKENS,
        "attention.arena": BEST_TOKENS * TOKEN_BYTES,
        "attention.tiers": [{"device": "cpu", "arena": SLOW_TOKENS * TOKEN_BYTES}],
        "attention.lease_ms": 3000,
        "placement.shard_tokens": 128,
        "placement.plan_interval_s": 0.0,
        "controller.drain_grace_s": 60,
        "telemetry.metrics_port": 0,
    }
    with process_cluster(model, folder, {**overrides, **more}) as cluster:
        yield cluster


class Stream:
    """A greedy answer that is read when asked for."""

    def __init__(self, client: Client, prompt: Sequence[int], tokens: int, name: str = "stream") -> None:
        self.token_ids: list[int] = []
        self._events = client.generate(
            token_ids=prompt,
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            deadline_s=120,
            request_id=name,
        )

    def read(self, tokens: int) -> None:
        """Go on until so many tokens are here."""
        while len(self.token_ids) < tokens:
            self.token_ids += getattr(next(self._events), "token_ids", ())

    def cancel(self) -> None:
        """Ask for no more."""
        self._events.cancel()

    def assert_ends_as(self, reference: Reference) -> None:
        """Read the rest; token for token what the reference says."""
        self.read(len(reference.tokens))
        self.token_ids += [token for event in self._events for token in getattr(event, "token_ids", ())]
        assert self.token_ids == list(reference.tokens)


def used_tokens(cluster: ProcessCluster) -> Mapping[str, int]:
    """How much of each arena sequences hold."""
    accounts = {name: account.blocks for name, account in cluster.audits().items()}
    return {
        name: BLOCK_TOKENS * (blocks.capacity - blocks.free - blocks.sealed_cached)
        for name, blocks in accounts.items()
    }


def moves(cluster: ProcessCluster) -> Moves:
    """What moved so far; only a sequence that runs can."""
    lines = (cluster.folder / "dense-0.log").read_text().splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return {(e["request_id"], e["peer"], e["target"]) for e in events if e["event"] == "moved"}


def metrics(cluster: ProcessCluster, worker_id: str) -> str:
    """What a process tells Prometheus."""
    address = next(m.metrics_address for m in cluster.members() if m.worker_id == worker_id)
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_a_request_larger_than_the_best_tier_lies_in_both(
    model: Path, expected: Reference, tmp_path: Path
) -> None:
    """One worker serves what its first arena cannot hold: that is filled, the next holds the rest, the tokens
    are the reference's, and everything is free again. The process's metrics name both arenas.
    """
    with two_tiers(model, tmp_path, 1) as cluster, cluster.client() as client:
        stream = Stream(client, PROMPT, COUNT)
        stream.read(20)
        used = used_tokens(cluster)
        assert used[BEST] == BEST_TOKENS
        assert len(PROMPT) - BEST_TOKENS < used[SLOW] < SLOW_TOKENS
        stream.assert_ends_as(expected)
        cluster.assert_nothing_leaks()
        arenas = [m for m in cluster.members() if m.role == inference_pb2.ROLE_ATTENTION]
        assert [(m.worker_id, m.slot, m.tier) for m in arenas] == [(BEST, BEST, 0), (SLOW, BEST, 1)]
        assert len({member.process_id for member in arenas}) == 1
        said = metrics(cluster, BEST)
        for name in (BEST, SLOW):
            assert f'anabranch_attention_blocks{{arena="{name}",state="free"}}' in said


def test_blocks_move_between_tiers_while_decoding(model: Path, tmp_path: Path) -> None:
    """Of a full first arena the planner lowers a part of the longest sequence, and when that has ended it
    lifts what another one had to leave below; no token changes.
    """
    prompt = random_prompt(200, seed=43)
    reference = reference_of(model, prompt, 1400)
    with two_tiers(model, tmp_path, 1, **{"placement.plan_interval_s": 0.1}) as cluster:
        with cluster.client() as client:
            long = Stream(client, random_prompt(500, seed=32), 1000, "long")
            long.read(1)
            stream = Stream(client, prompt, 1400)
            stream.read(1)
            wait_until(lambda: ("long", BEST, SLOW) in moves(cluster), WAIT_S)
            long.cancel()
            wait_until(lambda: ("stream", SLOW, BEST) in moves(cluster), WAIT_S)
            stream.assert_ends_as(reference)
        cluster.assert_nothing_leaks()


def test_a_killed_process_takes_both_arenas_along(model: Path, expected: Reference, tmp_path: Path) -> None:
    """SIGKILL in the middle of a stream: what both arenas held is computed again on the other worker's, no
    token is wrong, repeated or missing, and a successor joins with two new ones.
    """
    with two_tiers(model, tmp_path, 2) as cluster, cluster.client() as client:
        stream = Stream(client, PROMPT, COUNT)
        stream.read(4)
        assert all(used_tokens(cluster)[name] > 0 for name in (BEST, SLOW))
        cluster.kill(BEST)
        stream.assert_ends_as(expected)
        cluster.launch("attention", 0)
        successor = cluster.processes[BEST].pid

        def has_joined(members: Sequence[inference_pb2.Member]) -> bool:
            ready = [m for m in members if m.state == inference_pb2.MEMBER_STATE_READY]
            return [m.worker_id for m in ready if m.process_id == successor] == [BEST, SLOW]

        cluster.wait(has_joined)
        cluster.assert_nothing_leaks()


def test_a_drain_empties_both_arenas(model: Path, expected: Reference, tmp_path: Path) -> None:
    """SIGTERM: the blocks of both arenas move to the other worker's while the stream goes on, nothing is
    computed again, and the process leaves with status 0.
    """
    with two_tiers(model, tmp_path, 2) as cluster, cluster.client() as client:
        stream = Stream(client, PROMPT, COUNT)
        stream.read(4)
        assert all(used_tokens(cluster)[name] > 0 for name in (BEST, SLOW))
        leaving = cluster.drain(BEST)
        assert leaving.wait(WAIT_S) == 0, cluster.log(BEST)
        stream.assert_ends_as(expected)
        moved = moves(cluster)
        assert {source for _, source, _ in moved} == {BEST, SLOW}
        assert {target for _, _, target in moved} <= set(OTHERS)
        assert "anabranch_dense_tokens_lost_total 0.0" in metrics(cluster, "dense-0")
        cluster.assert_nothing_leaks()
