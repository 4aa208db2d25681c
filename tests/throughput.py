"""Decode throughput and peak memory of a small cluster: `python -m tests.throughput [attention workers]`.

SmolLM2 in float32 on one dense worker with one thread; 128 prompt tokens and 64 output tokens a request, at
1, 8 and 32 requests at a time. A table for orientation, not a benchmark: nothing runs beside it to compare.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anabranch import Client
from tests.models import random_prompt
from tests.processes import process_cluster
from tests.smollm2 import smollm2_folder

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 64
BATCHES = (1, 8, 32)
ROUNDS = 3


def arrivals_s(client: Client, seed: int) -> list[float]:
    """When each output token of one request arrived."""
    prompt = random_prompt(PROMPT_TOKENS, seed, vocabulary_size=40_000)
    stream = client.generate(token_ids=prompt, temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    return [time.monotonic() for event in stream for _ in getattr(event, "token_ids", ())]


def decode_rate(streams: Sequence[Sequence[float]]) -> float:
    """Tokens per second while every stream decodes: between the last first token and the first last one."""
    begin_s, end_s = max(times[0] for times in streams), min(times[-1] for times in streams)
    return sum(begin_s < moment <= end_s for times in streams for moment in times) / (end_s - begin_s)


def main(attention_workers: int) -> None:
    """Print a row per batch size, then the peak memory of each process."""
    overrides = {
        "model.name": "smollm2",
        "attention.replicas": attention_workers,
        "controller.expiry_ms": 30_000,  # nobody is to be taken for dead because the machine is busy
        "attention.arena": "1GiB",
        "dense.local_arena": "1GiB" if attention_workers == 0 else 0,
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        process_cluster(smollm2_folder(), Path(folder), overrides) as cluster,
        cluster.client() as client,
        ThreadPoolExecutor(max(BATCHES)) as pool,
    ):
        for batch in BATCHES:
            rates = []
            for attempt in range(ROUNDS):
                seeds = range(attempt * batch, (attempt + 1) * batch)
                streams = list(pool.map(arrivals_s, [client] * batch, seeds))
                rates.append(decode_rate(streams))
            print(
                f"batch {batch:2}: {statistics.median(rates):6.1f} tokens/s (median of {ROUNDS})", flush=True
            )
        for member in client.topology().members:
            print(f"{member.worker_id:12} peak {member.resident_peak_bytes / 2**20:6.0f} MiB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
