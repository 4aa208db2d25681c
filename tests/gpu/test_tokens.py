"""Whole decodes over attention workers that attend with Triton: interpreted on any machine, on a device with
`-m gpu`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster_harness import DenseCluster, Shape, request
from tests.models import random_prompt, reference_tokens, tiny_model

COUNT = 4
PROMPTS = [random_prompt(length, length) for length in (20, 5)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tokens_equal_transformers(device: str, tmp_path: Path) -> None:
    """Two sequences give transformers' tokens, with a window that cuts rows and shards: on a device over two
    workers; interpreted on one, because the interpreter serves one thread.
    """
    workers = 1 if device == "cpu" else 2
    folder = tiny_model(tmp_path / "model", "mistral", sliding_window=13)
    references = reference_tokens(folder, PROMPTS, COUNT)
    shape = Shape(
        attention_workers=workers,
        block_tokens=4,
        shard_tokens=8,
        step_tokens=16,
        overrides={
            "attention": {"kernel": "triton", "device": device},
            "lanes": {"deadline_floor_ms": 30_000},  # an interpreter takes its time
        },
    )
    with DenseCluster(folder, shape) as cluster:
        outputs = cluster.generate(request(prompt, COUNT) for prompt in PROMPTS)
    for output, reference in zip(outputs, references, strict=True):
        sharp = reference.sharp_length()
        assert output.failure is None
        assert len(output.token_ids) == COUNT
        assert output.token_ids[:sharp] == list(reference.tokens[:sharp])
    assert len({shard.worker for shard in outputs[0].maps[-1]}) == workers
