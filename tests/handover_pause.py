"""What hand-overs cost the streams they concern: `python -m tests.handover_pause [--json FILE]`.

SmolLM2 in float32, two dense and two attention workers, one thread each.

* Pause: a stream of 1,500 prompt tokens is handed back and forth; its gap at each hand-over less its median
  gap, in steps. Beyond two steps the exit status is 1.
* Interference: gaps of two decoding streams (99th percentile) alone, and beside prompts of 3,000 tokens, with
  both dense workers serving both and with `dense.serves: [prefill, decode]`. Where all processes share two
  cores, prompts on another worker still take time from the ones that decode.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from anabranch import Client
from anabranch.cli.bench import results_file
from anabranch.cli.bench.records import Results, extreme, figure, misses
from anabranch.v1 import dense_pb2, dense_pb2_grpc
from anabranch.wire import sequence_message
from cluster import rpc
from cluster.types import SequenceKey
from tests.attention_pool import call
from tests.models import random_prompt
from tests.processes import ProcessCluster, process_cluster
from tests.smollm2 import smollm2_folder

HAND_OVERS = (20, 40, 60, 80, 100)
"""Output tokens after which the stream changes its worker."""

PAUSE_MOST = 2.0
"""Steps that a hand-over may cost."""

OVERRIDES: dict[str, Any] = {
    "model.name": "smollm2",
    "dense.replicas": 2,
    "attention.arena": "512MiB",
    "attention.prefix_sharing": False,
    "controller.expiry_ms": 30_000,
}


def stream(client: Client, prompt_tokens: int, seed: int, max_tokens: int) -> Any:
    """A greedy request."""
    prompt = random_prompt(prompt_tokens, seed, vocabulary_size=40_000)
    return client.generate(token_ids=prompt, temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def hand_over(cluster: ProcessCluster, request_id: str) -> None:
    """Whoever has the request gives it away."""
    message = dense_pb2.HandoverRequest(sequences=[sequence_message(SequenceKey(request_id))])
    for member in cluster.members():
        if member.worker_id.startswith("dense"):
            with rpc.channel(member.address, cluster.config.security.tls) as channel:
                if call(dense_pb2_grpc.DenseServiceStub(channel).Handover, message).sequences:
                    return
    raise AssertionError(f"nobody has {request_id}")


def pauses(cluster: ProcessCluster, client: Client) -> list[float]:
    """What each hand-over of one stream added to its gap, in median steps."""
    running = stream(client, 1500, 1, 120)
    arrivals: list[float] = []
    for event in running:
        if getattr(event, "token_ids", ()):
            arrivals.append(time.monotonic())
            if len(arrivals) in HAND_OVERS:
                hand_over(cluster, running.request_id)
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    step_s = statistics.median(gaps)
    return [max(gaps[index - 1 : index + 3]) / step_s - 1 for index in HAND_OVERS]


def gaps_beside(client: Client, prompts: int) -> list[float]:
    """Seconds between tokens of two streams while others bring one long prompt after another."""
    enough = threading.Event()

    def decode(seed: int) -> list[float]:
        times = [
            time.monotonic() for event in stream(client, 64, seed, 150) if getattr(event, "token_ids", ())
        ]
        enough.set()
        return [after - before for before, after in itertools.pairwise(times[10:])]

    def prefill() -> None:
        for seed in itertools.count(100):
            if enough.is_set():
                return
            for _ in stream(client, 3000, seed, 3):
                pass

    with ThreadPoolExecutor(2 + prompts) as pool:
        decoding = [pool.submit(decode, seed) for seed in range(2)]
        beside = [pool.submit(prefill) for _ in range(prompts)]
        found = [gap for future in decoding for gap in future.result()]
        for future in beside:
            future.result()
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so many are not above."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure() -> Results:
    """Both, as records; told as they come."""
    found: Results = {"interference": {}}
    for serves in (["both"], ["prefill", "decode"]):
        overrides = {**OVERRIDES, "dense.serves": serves}
        with (
            tempfile.TemporaryDirectory() as folder,
            process_cluster(smollm2_folder(), Path(folder), overrides) as cluster,
            cluster.client() as client,
        ):
            if serves == ["both"]:
                steps = dict(zip(HAND_OVERS, pauses(cluster, client), strict=True))
                told = ", ".join(f"{pause:.2f}" for pause in steps.values())
                print(f"pause of each hand-over: {told} steps", flush=True)
                each = {f"after_{tokens}": figure([pause], "steps") for tokens, pause in steps.items()}
                found["pause"] = extreme("most", each, at_most=PAUSE_MOST)
            alone, beside = gaps_beside(client, 0), gaps_beside(client, 1)
            for name, gaps in (("alone", alone), ("beside long prompts", beside)):
                print(
                    f"serves {serves}, {name}: gaps of {1000 * statistics.median(gaps):.0f} ms, "
                    f"99th percentile {1000 * percentile(gaps, 0.99):.0f} ms",
                    flush=True,
                )
                found["interference"][f"{'+'.join(serves)} {name}"] = figure(gaps, "s")
    return found


def main() -> int:
    """Measure, write the file; 1 where a hand-over costs more than it may."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    found = measure()
    if options.json:
        results_file.write(options.json, results_file.stamp({"handover": found}))
    missed = misses(found)
    print("\n".join(missed), end="\n" if missed else "")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
