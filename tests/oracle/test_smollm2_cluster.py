"""The real model through whole clusters: a chat and a text, however the KV cache is cut and placed.

The full matrix of prompts and shapes runs by `make oracle-full`.
"""

from __future__ import annotations

import pytest

from tests.cluster_harness import Shape
from tests.oracle.matrix import Tally, compare
from tests.oracle.smollm2_part import ObservedCluster, compare_scores
from tests.oracle.smollm2_references import Reference, prompts, reference
from tests.smollm2 import smollm2_folder

TEXT, CHAT = 10, 14
"""Which of the prompts: 233 tokens of text, and a question of 37 tokens as a chat."""

GENERATED_TOKENS = 12

SHAPES = {
    "1 worker": Shape(attention_workers=1, step_tokens=256),
    "local arena and 2 workers": Shape(
        local_blocks=6, attention_workers=2, step_tokens=256, block_tokens=7, shard_tokens=98
    ),
    "5 workers": Shape(attention_workers=5, step_tokens=256, shard_tokens=48),
}
"""The text's shards are of unequal sizes."""


@pytest.fixture(scope="module")
def references() -> list[Reference]:
    """transformers' answers, from the user's cache or computed once."""
    return [reference(prompts()[index]) for index in (TEXT, CHAT)]


@pytest.mark.parametrize("name", SHAPES)
def test_the_real_model_over_shards_equals_transformers(name: str, references: list[Reference]) -> None:
    """Greedy tokens of a batch, then every position of a text that is given, log-probabilities included."""
    shape, tally = SHAPES[name], Tally()
    with ObservedCluster(smollm2_folder(), shape) as cluster:
        outputs = cluster.run([each.prompt for each in references], GENERATED_TOKENS)
        cluster.wait_all_free()
        chat = references[-1]
        tally.add(compare_scores(f"chat over {name}", cluster.teacher_forced(chat.inputs), chat))
        cluster.wait_all_free()
    for output, each in zip(outputs, references, strict=True):
        tally.add(compare(name, output, each.expected().beginning(GENERATED_TOKENS)))
    assert tally.verdict() == []
    assert tally.compared >= len(references[-1].inputs) + GENERATED_TOKENS
    workers = {shard.worker for shard in outputs[0].maps[-1]}
    assert len(workers) == shape.attention_workers + (shape.local_blocks > 0)
