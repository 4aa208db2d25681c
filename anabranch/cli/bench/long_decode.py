"""`anabranch bench long-decode`: decoding behind nearly two million tokens, and a check of every answer.

The cache has generated contents, so that nobody has to compute it; scheduler, lanes and attention workers are
the real ones, and each layer's outputs are compared with float64 (`streaming`). It says that attention over
many shards is right at any length and what it costs, and nothing about a model's quality there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Literal

import torch
from torch import Tensor

from anabranch.cli.bench import filling, random_model, streaming
from anabranch.cli.bench.filling import CHUNK_TOKENS, Filler
from anabranch.cli.bench.long_cluster import WAIT_S, LongCluster, long_cluster
from anabranch.cli.bench.records import Results, figure, ratio
from anabranch.cli.bench.step_settings import StepSettings
from anabranch.cli.bench.streaming import RecordingDecoder
from cluster.errors import Internal
from cluster.sampling import SamplingParameters
from cluster.types import KvGeometry, SequenceKey, ShardRef
from workers.dense.sequences import Submission
from workers.lanes.codec import torch_dtype

ERROR_BOUND = {
    # Sums of millions of products in single precision, block by block; weights and outputs likewise.
    "float32": 2e-5,
    # What a bfloat16 kernel may err by (4e-3, its oracle test), and an output's rounding to 8 bits (2e-3).
    "bfloat16": 6e-3,
}
"""||out - expected|| / ||expected|| of a query head, at most."""

_LAYERS, _QUERY_HEADS, _KV_HEADS, _HEAD_SIZE, _VOCABULARY = 4, 4, 2, 64, 256
_MODEL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _QUERY_HEADS,
    "num_key_value_heads": _KV_HEADS,
    "head_dim": _HEAD_SIZE,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 2**21,
}
_WEIGHT_SCALE = 0.0625
"""One over the root of the hidden size: queries are of unit size."""

_KEY_SCALE = 2.5
"""Scores then spread by 2.5: some thousand of two million tokens carry most of the weight, anywhere."""

_KEY = SequenceKey("long-decode")
_BLOCK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Generated:
    """The cache's contents: the same for who fills it and who checks. Chunks begin at whole multiples."""

    geometry: KvGeometry

    def __call__(self, layer: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """See `filling.Contents`."""
        chunk = first // CHUNK_TOKENS
        assert first % CHUNK_TOKENS == 0
        assert end <= first + CHUNK_TOKENS
        generator = torch.Generator().manual_seed(chunk * self.geometry.layers + layer)
        shape = (2, CHUNK_TOKENS, self.geometry.kv_heads, self.geometry.head_size)
        key, value = torch.randn(shape, generator=generator)[:, : end - first]
        return (key * _KEY_SCALE).to(torch_dtype(self.geometry)), value.to(torch_dtype(self.geometry))


def measure(
    tokens: int,
    steps: int,
    workers: int,
    dtype: Literal["float32", "bfloat16"],
    say: Callable[[str], None],
) -> Results:
    """Seconds of each of `steps` tokens behind `tokens` cached ones, and how far it is from float64."""
    bounds = [-(-tokens * index // workers // CHUNK_TOKENS) * CHUNK_TOKENS for index in range(workers)]
    bounds.append(tokens)
    with tempfile.TemporaryDirectory(prefix="anabranch-bench-") as name:
        random_model.write(Path(name), _MODEL, _WEIGHT_SCALE)
        settings = _settings(name, max(end - first for first, end in pairwise(bounds)), workers, dtype)
        torch.set_num_threads(1)
        decoder = RecordingDecoder.from_folder(name, getattr(torch, dtype))
        assert isinstance(decoder, RecordingDecoder)
        decoder.rows = {}
        with long_cluster(settings, decoder) as (cluster, processes):
            contents = Generated(cluster.geometry)
            shards = _fill(cluster, contents, bounds, steps, say)
            began_s = cluster.run(_submission(tokens, steps, shards), lambda _: say("decoding"))
            peaks, watch = processes.peaks_bytes(), cluster.watch
    if watch.computed != steps:
        raise Internal(
            f"{watch.computed} tokens were computed, not {steps}: the cache was not taken over whole"
        )
    found = streaming.errors(decoder.rows, _LAYERS, tokens, contents, say)
    cache_bytes = tokens * contents.geometry.token_bytes
    told = {"tokens": tokens, "attention_workers": workers, "dtype": dtype, "cache_bytes": cache_bytes}
    between_s = [later - earlier for earlier, later in pairwise(watch.tokens_s)]
    return {
        "long_decode": {
            "ttft": figure([watch.tokens_s[0] - began_s], "s", settings=told),
            "token": figure(between_s, "s", settings=told),
            "cache_read": figure([cache_bytes / second for second in between_s], "B/s", settings=told),
            "error": ratio(
                ("largest difference from float64", [max(found)]),
                ("allowed", [ERROR_BOUND[dtype]]),
                "of the output's norm",
                at_most=1.0,
                settings=told | {"compared": len(found)},
            ),
            "peak_memory": figure([sum(peaks)], "B", settings=told),
        }
    }


def _settings(
    model: str, shard_tokens: int, workers: int, dtype: Literal["float32", "bfloat16"]
) -> StepSettings:
    element_bytes = 4 if dtype == "float32" else 2
    token_bytes = 2 * _LAYERS * _KV_HEADS * _HEAD_SIZE * element_bytes
    return StepSettings(
        model,
        (),
        (0,),  # each worker is given its own
        arena_bytes=(shard_tokens + 8 * _BLOCK_TOKENS) * token_bytes,
        dtype=dtype,
        attention_workers=workers,
    )


def _token_ids(tokens: int) -> tuple[int, ...]:
    """The cached tokens and the last one, which is not."""
    return tuple(index % 251 for index in range(tokens + 1))


def _fill(
    cluster: LongCluster, contents: Generated, bounds: list[int], steps: int, say: Callable[[str], None]
) -> tuple[ShardRef, ...]:
    """A shard on each worker, from bound to bound; the last one has room for the tokens to come."""
    token_ids = _token_ids(bounds[-1])
    shards = []
    for member, (first, end) in zip(cluster.members, pairwise(bounds), strict=True):
        say(f"filling positions {first:,} to {end:,} on {member.worker}")
        peer = cluster.peer(member)
        filler = Filler(peer, cluster.geometry, contents)
        more_tokens = steps if end == bounds[-1] else 0
        shards.append(filler.fill_shard(_KEY, first, token_ids, end, more_tokens))
        filler.close()
        peer.close()
    return tuple(shards)


def _submission(tokens: int, steps: int, shards: tuple[ShardRef, ...]) -> Submission:
    """A take-over of the filled sequence: it decodes at once."""
    sampling = SamplingParameters(temperature=0.0, ignore_eos=True, seed=0, max_tokens=steps)
    generation, deadline_s = filling.FIRST_GENERATION + 1, monotonic() + WAIT_S
    return Submission(
        _KEY, generation, _token_ids(tokens), (), sampling, 0, steps, 0, deadline_s, "bench", shards
    )
