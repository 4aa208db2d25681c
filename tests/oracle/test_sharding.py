"""Whole generation against transformers, token for token, however the KV cache is cut and placed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.types import SequenceKey
from tests.cluster_harness import DenseCluster, Output, Shape, assert_continues, request
from tests.models import NEAR_TIE, Reference, random_prompt, reference_tokens, tiny_model

COUNT = 20
PROMPT_LENGTHS = (70, 1, 33, 5, 64, 17, 100, 2, 48, 9, 31, 3, 55, 12, 40, 7)
PROMPTS = [random_prompt(length, seed) for seed, length in enumerate(PROMPT_LENGTHS)]
NEAR_TIES_MOST = 0.02

MONOLITHIC = Shape(local_blocks=256)
SHAPES = {
    "monolithic": MONOLITHIC,
    "1-local": Shape(attention_workers=1),
    "2-tcp": Shape(attention_workers=2, transports=("tcp",)),
    "3-grpc": Shape(attention_workers=3, transports=("grpc",)),
    "5-local": Shape(attention_workers=5, shard_tokens=16),
    "local arena that overflows": Shape(attention_workers=2, local_blocks=4),
}
_ROUNDS_MOST = 10


@pytest.fixture(scope="module")
def references(folder: Path) -> list[Reference]:
    """What transformers generates after each of `PROMPTS`."""
    found = reference_tokens(folder, PROMPTS, COUNT)
    near_ties = sum(gap < NEAR_TIE for reference in found for gap in reference.gaps)
    assert near_ties <= NEAR_TIES_MOST * COUNT * len(PROMPTS)
    return found


def assert_same(outputs: Sequence[Output], references: Sequence[Reference]) -> None:
    """Tokens agree up to the first near-tie of the reference."""
    for output, reference in zip(outputs, references, strict=True):
        assert_continues(output, reference)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tokens_equal_transformers_over_shards(
    shape: Shape, folder: Path, references: list[Reference]
) -> None:
    """A mixed batch of four gives transformers' tokens on no, one, two, three and five attention workers."""
    with DenseCluster(folder, shape) as cluster:
        outputs = cluster.generate(request(prompt, COUNT) for prompt in PROMPTS[:4])
    assert_same(outputs, references[:4])
    workers = {shard.worker for output in outputs for shard in output.maps[-1]}
    assert len(workers) == shape.attention_workers + (shape.local_blocks > 0)


@pytest.mark.parametrize("step_tokens", [1, 2, 3, 7, 16, 33, 64])
def test_tokens_do_not_depend_on_chunk_size(
    step_tokens: int, folder: Path, references: list[Reference]
) -> None:
    """Prompts cut into chunks of any size, decoded beside others' chunks, give the same tokens."""
    with DenseCluster(folder, Shape(attention_workers=2, step_tokens=step_tokens)) as cluster:
        outputs = cluster.generate(request(prompt, COUNT) for prompt in PROMPTS[:3])
    assert_same(outputs, references[:3])


@pytest.mark.parametrize("block_tokens", [1, 7, 16, 32])
def test_tokens_do_not_depend_on_block_size(
    block_tokens: int, folder: Path, references: list[Reference]
) -> None:
    """Blocks of one token, of an odd number and of more than a shard give the same tokens."""
    shape = Shape(attention_workers=3, block_tokens=block_tokens, shard_tokens=20)
    with DenseCluster(folder, shape) as cluster:
        outputs = cluster.generate(request(prompt, COUNT) for prompt in PROMPTS[:3])
    assert_same(outputs, references[:3])


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_tokens_do_not_depend_on_the_batch(batch: int, folder: Path, references: list[Reference]) -> None:
    """A sequence gives the same tokens alone and among fifteen others of other lengths."""
    with DenseCluster(folder, Shape(attention_workers=2)) as cluster:
        outputs = cluster.generate(request(prompt, COUNT) for prompt in PROMPTS[:batch])
    assert_same(outputs, references[:batch])


@pytest.mark.parametrize(
    "shape",
    [Shape(local_blocks=9), Shape(attention_workers=2, worker_blocks=5)],
    ids=["monolithic", "2 workers"],
)
def test_preemption_changes_no_token(shape: Shape, folder: Path, references: list[Reference]) -> None:
    """Arenas too small for the batch: sequences are preempted, recomputed, and end with the same tokens."""
    prompts, expected = [PROMPTS[0], PROMPTS[2], PROMPTS[4]], [references[0], references[2], references[4]]
    preemptions = 0
    with DenseCluster(folder, shape) as cluster:
        # Whether somebody is preempted or waits instead depends on when room is answered: ask until one is.
        for _ in range(_ROUNDS_MOST):
            outputs = cluster.generate(request(prompt, COUNT) for prompt in prompts)
            assert_same(outputs, expected)
            preemptions += sum(output.timings.preemptions for output in outputs if output.timings)
            if preemptions:
                return
    raise AssertionError(f"nobody was preempted in {_ROUNDS_MOST} rounds")


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("mistral", {"sliding_window": 16}),
        (
            "smollm3",
            {
                "num_hidden_layers": 4,
                "no_rope_layers": [1, 0, 1, 0],
                "use_sliding_window": True,
                "sliding_window": 24,
            },
        ),
        ("qwen3", {}),
    ],
    ids=["window in all layers", "window in some layers", "normed heads"],
)
def test_windows_and_other_models_over_shards(
    architecture: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    """Windows that end inside shards, or leave whole shards out of sight, give transformers' tokens."""
    folder = tiny_model(tmp_path, architecture, **overrides)
    references = reference_tokens(folder, PROMPTS[:3], COUNT)
    shape = Shape(attention_workers=3, block_tokens=8, shard_tokens=24, step_tokens=19)
    with DenseCluster(folder, shape) as cluster:
        outputs = cluster.generate(request(prompt, COUNT) for prompt in PROMPTS[:3])
    assert_same(outputs, references)


def test_sampled_tokens_depend_on_seed_choice_and_index_only(folder: Path) -> None:
    """Same seed, same tokens: alone, in a batch and over three workers; another choice gives others."""
    sampling: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "seed": 7}

    def key(choice: int) -> SequenceKey:
        return SequenceKey("sampled", choice)

    with DenseCluster(folder, MONOLITHIC) as cluster:
        (alone,) = cluster.generate([request(PROMPTS[2], COUNT, key=key(0), **sampling)])
    with DenseCluster(folder, MONOLITHIC) as cluster:
        others = [request(prompt, COUNT) for prompt in PROMPTS[3:8]]
        batched = cluster.generate([*others, request(PROMPTS[2], COUNT, key=key(0), **sampling)])[-1]
    with DenseCluster(folder, Shape(attention_workers=3)) as cluster:
        sharded, second = cluster.generate(
            request(PROMPTS[2], COUNT, key=key(choice), **sampling) for choice in (0, 1)
        )
    sharp = sharp_length(alone)
    assert sharp > COUNT // 2
    assert batched.token_ids[:sharp] == alone.token_ids[:sharp] == sharded.token_ids[:sharp]
    assert second.token_ids != sharded.token_ids


def test_penalties_see_the_whole_history_after_preemption(folder: Path) -> None:
    """Penalties over prompt and output give the same tokens in a small arena as in a large one."""
    sampling: dict[str, Any] = {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5}

    def run(shape: Shape) -> list[Output]:
        with DenseCluster(folder, shape) as cluster:
            return cluster.generate(request(PROMPTS[i], COUNT, **sampling) for i in (0, 2, 4))

    for small, large in zip(run(replace(MONOLITHIC, local_blocks=9)), run(MONOLITHIC), strict=True):
        sharp = sharp_length(large)
        assert small.token_ids[:sharp] == large.token_ids[:sharp]


def sharp_length(output: Output) -> int:
    """Tokens before the first choice that float32 does not decide."""
    return next((i for i, gap in enumerate(output.gaps) if gap < NEAR_TIE), len(output.gaps))
