"""Clusters of attention workers with two arenas, as processes, and a stream beside which blocks move between
them. Knows nothing of pytest.
"""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anabranch import Client
from tests.attention_worker import wait_until
from tests.models import Reference, random_prompt, reference_tokens, tiny_model
from tests.processes import ProcessCluster, process_cluster

TOKEN_BYTES = 512
"""Of the tiny model's cache."""
BLOCK_TOKENS = 8
BEST_TOKENS, SLOW_TOKENS = 400, 1920
BEST, SLOW = "attention-0", "attention-0.1"
WAIT_S = 60.0
Moves = set[tuple[str, str, str]]
"""(request, from, to)"""


def model_of_long_sequences(folder: Path) -> Path:
    """A tiny model whose sequences may be longer than one arena."""
    return tiny_model(folder, "llama", tokenizer=True, max_position_embeddings=8192)


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
        """Read the rest; token for token what the reference says, up to the first near-tie."""
        self.read(len(reference.tokens))
        self.token_ids += [token for event in self._events for token in getattr(event, "token_ids", ())]
        sharp = reference.sharp_length()
        assert len(self.token_ids) == len(reference.tokens)
        assert self.token_ids[:sharp] == list(reference.tokens[:sharp])


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


def assert_moves_both_ways(model: Path, folder: Path, device: str = "cpu", **more: Any) -> None:
    """One worker with an arena on a device and one in host memory. Of the full first one the planner lowers a
    part of the longest sequence; when that has ended it lifts what another one had to leave below. The
    other's tokens are the reference's.

    The first arena is so large that the other one's growth alone never fills it: it can be lifted as long as
    it runs.
    """
    prompt, count = random_prompt(1000, seed=48), 1000
    (reference,) = reference_tokens(model, [prompt], count, device)
    assert reference.sharp_length() >= count // 2, "take another seed: a near-tie ends the comparison"
    overrides = {
        "attention.device": device,
        "attention.arena": 3000 * TOKEN_BYTES,
        "attention.tiers": [{"device": "cpu", "arena": 4000 * TOKEN_BYTES}],
        "dense.device": device,
        "placement.plan_interval_s": 0.1,
    }
    with two_tiers(model, folder, 1, **overrides, **more) as cluster:
        with cluster.client() as client:
            long = Stream(client, random_prompt(3200, seed=32), 1800, "long")
            long.read(1)
            stream = Stream(client, prompt, count)
            stream.read(1)
            wait_until(lambda: ("long", BEST, SLOW) in moves(cluster), WAIT_S)
            long.cancel()
            wait_until(lambda: ("stream", SLOW, BEST) in moves(cluster), WAIT_S)
            stream.assert_ends_as(reference)
        cluster.assert_nothing_leaks()
