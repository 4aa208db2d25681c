"""`anabranch bench long-prefill`: a prompt of hundreds of thousands of tokens, computed whole.

The model is tiny and random, its context is not: every token attends to all before it, at the attention
workers that hold them, so the attention of n tokens costs 2 n^2 x layers x query heads x head size FLOP.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import torch

from anabranch.cli.bench import random_model
from anabranch.cli.bench.long_cluster import WAIT_S, long_cluster
from anabranch.cli.bench.records import Results, figure, ratio
from anabranch.cli.bench.step_settings import StepSettings
from cluster.errors import Internal
from cluster.sampling import SamplingParameters
from cluster.types import SequenceKey
from workers.dense.model import Decoder
from workers.dense.sequences import Submission

TEN_MINUTES_S = 600.0
_LAYERS, _QUERY_HEADS, _KV_HEADS, _HEAD_SIZE, _VOCABULARY = 2, 2, 1, 64, 512
_MODEL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _QUERY_HEADS,
    "num_key_value_heads": _KV_HEADS,
    "head_dim": _HEAD_SIZE,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 2**21,
}
_OUTPUT_TOKENS = 4
_SHARD_TOKENS = 8192
_BLOCK_TOKENS = 32
_SPARE_BLOCKS = 8


def measure(tokens: int, workers: int, step_tokens: int, say: Callable[[str], None]) -> Results:
    """Seconds to the first token of a prompt of `tokens`, computed in float32."""
    with tempfile.TemporaryDirectory(prefix="anabranch-bench-") as name:
        random_model.write(Path(name), _MODEL)
        settings = _settings(name, tokens, workers, step_tokens)
        torch.set_num_threads(1)
        decoder = Decoder.from_folder(name, torch.float32)
        with long_cluster(settings, decoder) as (cluster, processes):
            submission = _submission(tokens)
            began_s = cluster.run(submission, lambda done: say(f"{done:,} of {tokens:,} tokens computed"))
            peaks, spent_s = processes.peaks_bytes(), processes.processor_s()
            watch = cluster.watch
    if watch.computed != tokens + _OUTPUT_TOKENS - 1:
        raise Internal(f"{watch.computed} tokens were computed, not the prompt's {tokens}")
    told = {"tokens": tokens, "attention_workers": workers, "step_tokens": step_tokens, "dtype": "float32"}
    first_s = watch.tokens_s[0] - began_s
    flops = 2.0 * tokens**2 * _LAYERS * _QUERY_HEADS * _HEAD_SIZE
    return {
        "long_prefill": {
            "ttft": figure([first_s], "s", settings=told),
            "of_ten_minutes": ratio(
                ("first token", [first_s]), ("ten minutes", [TEN_MINUTES_S]), "s", at_most=1.0, settings=told
            ),
            "step": figure(watch.steps_s, "s", settings=told),
            "attention_flops": figure([flops / first_s], "FLOP/s", settings=told),
            "outside_steps": figure(
                [first_s - sum(watch.steps_s[: -_OUTPUT_TOKENS + 1])], "s", settings=told
            ),
            "processor": figure([sum(spent_s)], "s", settings=told),
            "peak_memory": figure([sum(peaks)], "B", settings=told),
        }
    }


def _settings(model: str, tokens: int, workers: int, step_tokens: int) -> StepSettings:
    """Arenas that hold the sequence, and shards that keep all workers busy from the beginning."""
    token_bytes = 2 * _LAYERS * _KV_HEADS * _HEAD_SIZE * 4
    shard_tokens = max(_SHARD_TOKENS, tokens // 32)
    held = -(-tokens // (workers * shard_tokens)) * shard_tokens
    return StepSettings(
        model,
        (),
        (0,),  # each worker is given its own
        arena_bytes=(held + _SPARE_BLOCKS * _BLOCK_TOKENS) * token_bytes,
        dtype="float32",
        attention_workers=workers,
        step_tokens=step_tokens,
        shard_tokens=shard_tokens,
    )


def _submission(tokens: int) -> Submission:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(_VOCABULARY, (tokens,), generator=generator).tolist()
    sampling = SamplingParameters(temperature=0.0, ignore_eos=True, seed=0, max_tokens=_OUTPUT_TOKENS)
    key, deadline_s = SequenceKey("long-prefill"), monotonic() + WAIT_S
    return Submission(key, 1, tuple(prompt), (), sampling, 0, _OUTPUT_TOKENS, 0, deadline_s, "bench")
