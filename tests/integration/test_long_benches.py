"""The long benches, scaled down: real attention workers in processes, every output checked in float64."""

from __future__ import annotations

from typing import Literal

import pytest

from anabranch.cli.bench.long_decode import measure as measure_decode
from anabranch.cli.bench.long_prefill import measure as measure_prefill
from anabranch.cli.bench.records import Results, is_within_bound

pytestmark = pytest.mark.system  # many processes: minutes rather than seconds

CACHED_TOKENS = 20_000
STEPS = 5


def quiet(_words: str) -> None:
    """Nobody looks."""


def decode(dtype: Literal["float32", "bfloat16"]) -> Results:
    """The results over four workers, which `long-decode` would print."""
    results: Results = measure_decode(CACHED_TOKENS, STEPS, 4, dtype, quiet)["long_decode"]
    return results


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_over_four_workers_is_right(dtype: Literal["float32", "bfloat16"]) -> None:
    """Decoding behind 20,000 generated tokens, over four workers, agrees with float64 everywhere."""
    results = decode(dtype)
    assert is_within_bound(results["error"])
    assert results["error"]["settings"]["compared"] == STEPS * 4 * 4
    assert len(results["token"]["samples"]) == STEPS - 1


def test_a_long_prompt_is_computed_whole() -> None:
    """16,384 tokens over two workers and many shards: each is computed once, and then it goes on."""
    results = measure_prefill(16_384, 2, 1024, quiet)["long_prefill"]  # it raises where tokens are missing
    assert len(results["step"]["samples"]) >= 16_384 // 1024
