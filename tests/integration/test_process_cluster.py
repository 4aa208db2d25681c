"""Whole clusters of role processes: any numbers of both sides, and what happens when one dies."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from anabranch import Client
from tests.models import Reference, random_prompt, reference_tokens, tiny_model
from tests.processes import process_cluster

NEAR_TIE = 1e-3
PROMPTS = [random_prompt(length, seed) for length, seed in ((1, 1), (17, 2), (90, 3))]
TOKENS = 24


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return tiny_model(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(scope="session")
def references(model: Path) -> Sequence[Reference]:
    """What transformers says after each prompt."""
    return reference_tokens(model, PROMPTS, TOKENS)


def _assert_same(tokens: Sequence[int], reference: Reference) -> None:
    """Token for token up to the first near-tie."""
    for index, (token, expected, gap) in enumerate(
        zip(tokens, reference.tokens, reference.gaps, strict=True)
    ):
        if gap < NEAR_TIE:
            return
        assert token == expected, f"token {index}"


def _generate(client: Client, prompt: Sequence[int]) -> list[int]:
    stream = client.generate(token_ids=prompt, temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    return [token for event in stream for token in getattr(event, "token_ids", ())]


@pytest.mark.parametrize(
    ("dense", "attention"), [(1, 0), (1, 1), (1, 2), (1, 3), (1, 5), (2, 1), (2, 3)], ids=str
)
def test_any_numbers_of_both_sides_serve_the_same_tokens(
    model: Path, references: Sequence[Reference], tmp_path: Path, dense: int, attention: int
) -> None:
    """Clusters of every shape answer as transformers does, give every block back, and stop by themselves."""
    overrides = {
        "dense.replicas": dense,
        "attention.replicas": attention,
        "attention.block_tokens": 8,
        "placement.shard_tokens": 16,
        "dense.local_arena": "8MiB" if attention == 0 else 0,
    }
    with process_cluster(model, tmp_path, overrides) as cluster:
        with cluster.client() as client:
            for prompt, reference in zip(PROMPTS, references, strict=True):
                _assert_same(_generate(client, prompt), reference)
        cluster.assert_nothing_leaks()
