"""Instances: whose attention workers a dense worker uses, over real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anabranch import Client
from anabranch.events import TokenDelta
from cluster.errors import ResourceExhausted
from tests.models import Reference, random_prompt, reference_tokens, tiny_model
from tests.processes import ProcessCluster, process_cluster

pytestmark = pytest.mark.system  # many processes: minutes rather than seconds

TOKENS = 20
PROMPT = random_prompt(200, 5)


@pytest.fixture(name="model", scope="module")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"), "llama", tokenizer=True)


@pytest.fixture(name="expected", scope="module")
def _expected(model: Path) -> Reference:
    (reference,) = reference_tokens(model, [PROMPT], TOKENS)
    return reference


def settings(instances: str, arena: str) -> dict[str, Any]:
    """Two instances of one attention worker each."""
    return {
        "dense.replicas": 2,
        "attention.replicas": 2,
        "attention.arena": arena,
        "attention.block_tokens": 8,
        "placement.shard_tokens": 64,
        "placement.instances": instances,
    }


def generate(cluster: ProcessCluster, client: Client) -> tuple[list[int], int]:
    """The tokens of the long prompt, and how many attention workers held some of it after the first."""
    tokens: list[int] = []
    holding = 0
    for event in client.generate(token_ids=PROMPT, temperature=0.0, max_tokens=TOKENS, ignore_eos=True):
        if isinstance(event, TokenDelta):
            tokens += event.token_ids
            if not holding:
                accounts = [account.blocks for account in cluster.audits().values()]
                holding = sum(blocks.free < blocks.capacity for blocks in accounts)
    return tokens, holding


@pytest.mark.parametrize(("arena", "workers"), [("200KiB", 1), ("80KiB", 2)])
def test_an_instance_borrows_what_it_lacks(
    model: Path, expected: Reference, tmp_path: Path, arena: str, workers: int
) -> None:
    """With room at home nothing lies elsewhere, whatever `shard_tokens`; without, another instance lends, and
    the tokens are the reference's.
    """
    with process_cluster(model, tmp_path, settings("borrowing", arena)) as cluster:
        with cluster.client() as client:
            tokens, holding = generate(cluster, client)
        assert tokens == list(expected.tokens)
        assert holding == workers
        cluster.assert_nothing_leaks()


def test_separate_instances_share_nothing(model: Path, tmp_path: Path) -> None:
    """What does not fit into its own instance is refused, though the other one has room."""
    with (
        process_cluster(model, tmp_path, settings("separate", "80KiB")) as cluster,
        cluster.client() as client,
        pytest.raises(ResourceExhausted, match="1 arena holds"),
    ):
        generate(cluster, client)
