"""A request larger than any attention worker: 7.9 times what one of eight holds, token for token."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import ResourceExhausted
from tests.cluster_harness import DenseCluster, Shape, assert_continues, request, wait_until
from tests.models import random_prompt, reference_tokens, tiny_model
from tests.smollm2 import smollm2_folder

CAP_TOKENS = 125
"""31 blocks and a token, as 1,000 tokens are 31 blocks of 32 and some."""

WORKERS = 8
LENGTH = int(7.9 * CAP_TOKENS)
OUTPUT_TOKENS = 24
WAIT_S = 500.0
BLOCK_TOKENS = 4
CAPPED = Shape(
    attention_workers=WORKERS,
    worker_blocks=CAP_TOKENS // BLOCK_TOKENS,
    block_tokens=BLOCK_TOKENS,
    step_tokens=64,
)


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose context is longer than the request."""
    return tiny_model(tmp_path_factory.mktemp("long"), max_position_embeddings=2048)


@pytest.mark.parametrize("shard_tokens", [1024, 40], ids=["shards of a whole worker", "many small shards"])
def test_eight_workers_serve_what_none_of_them_holds(shard_tokens: int, long_folder: Path) -> None:
    """Prompt and output of 7.9 caps give transformers' tokens; nearly every block of the cluster is used."""
    prompt = random_prompt(LENGTH - OUTPUT_TOKENS, 0)
    (reference,) = reference_tokens(long_folder, [prompt], OUTPUT_TOKENS)
    shape = Shape(**{**vars(CAPPED), "shard_tokens": shard_tokens})
    with DenseCluster(long_folder, shape) as cluster:
        (output,) = cluster.generate([request(prompt, OUTPUT_TOKENS)])
    assert_continues(output, reference)
    shards = output.maps[-1]
    assert {shard.worker for shard in shards} == set(cluster.workers)
    assert shards[-1].end == LENGTH
    assert max(reference.sharp_length(), 1) > OUTPUT_TOKENS // 2


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_real_model_says_the_same_over_eight_workers() -> None:
    """SmolLM2 where each worker holds 1,000 tokens: 7,900 of prompt and output, with transformers' tokens."""
    cap_tokens, block_tokens = 1000, 32
    length = int(7.9 * cap_tokens)
    prompt = random_prompt(length - OUTPUT_TOKENS, 0, vocabulary_size=40_000)
    shape = Shape(
        attention_workers=WORKERS,
        worker_blocks=cap_tokens // block_tokens,
        block_tokens=block_tokens,
        step_tokens=256,
    )
    # The plainest attention writes all scores of a layer, 2.2 GB.
    (reference,) = reference_tokens(smollm2_folder(), [prompt], OUTPUT_TOKENS, attention="sdpa")
    with DenseCluster(smollm2_folder(), shape) as cluster:
        asked = cluster.submit(request(prompt, OUTPUT_TOKENS, deadline_s=WAIT_S))
        output = cluster.listener.output(asked)
        wait_until(lambda: output.is_over, WAIT_S)
    assert_continues(output, reference)
    assert {shard.worker for shard in output.maps[-1]} == set(cluster.workers)
    assert output.maps[-1][-1].end == length
    assert reference.sharp_length() > OUTPUT_TOKENS // 2


def test_one_worker_of_that_size_refuses_at_admission(long_folder: Path) -> None:
    """The same request where one such worker is all there is: RESOURCE_EXHAUSTED, sizes and a way out."""
    prompt = random_prompt(LENGTH - OUTPUT_TOKENS, 0)
    with DenseCluster(long_folder, Shape(**{**vars(CAPPED), "attention_workers": 1})) as cluster:
        (output,) = cluster.generate([request(prompt, OUTPUT_TOKENS)])
    assert isinstance(output.failure, ResourceExhausted)
    assert output.token_ids == []
    for words in (f"{LENGTH} tokens", "1 arena holds 124", "more attention workers"):
        assert words in output.failure.message
