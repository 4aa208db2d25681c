"""What a stopped controller costs new requests: `python -m tests.controller_stopped`.

SmolLM2 in float32, a gateway, a dense and two attention workers, one thread each. Four clients ask one short
request after the other: for a minute undisturbed, for one with the controller stopped (SIGSTOP), and for one
afterwards. Prints requests per second of each, and the ratio of the second to the first and third.
"""

import signal
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from anabranch import Client
from cluster.registry.settings import RegistryConfig
from tests.controlled import ControlledCluster, controlled
from tests.models import random_prompt
from tests.smollm2 import smollm2_folder

ROLES = ("attention-0", "attention-1", "dense-0", "gateway-0")
SETTINGS: dict[str, Any] = {
    "controller__expiry_ms": 5000,
    "attention__arena": "256MiB",
    "attention__block_tokens": 32,
}
CLIENTS = 4
MINUTE_S = 60.0


def requests_of(client: Client, index: int, until_s: float) -> int:
    """Ask until then; how many were answered. Each prompt is new, so that none is found in the pool."""
    for count in range(1_000_000):
        if time.monotonic() >= until_s:
            return count
        prompt = random_prompt(64, 1000 * index + count, vocabulary_size=40_000)
        list(client.generate(token_ids=prompt, temperature=0.0, max_tokens=16, ignore_eos=True))
    raise AssertionError("unreachable in a minute")


def rate(client: Client, seed: int) -> float:
    """Requests per second in a minute."""
    began_s = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as executor:
        asked = [
            executor.submit(requests_of, client, seed + index, began_s + MINUTE_S) for index in range(CLIENTS)
        ]
        answered = sum(each.result() for each in asked)
    return answered / (time.monotonic() - began_s)


def measure(cluster: ControlledCluster) -> None:
    """Three minutes."""
    for name in ROLES:
        cluster.launch(name)
    cluster.await_ready(*ROLES)
    with cluster.client("gateway-0") as client:
        requests_of(client, 999, time.monotonic() + 5.0)
        before = rate(client, 0)
        print(f"undisturbed: {before:.2f} requests/s", flush=True)
        cluster.signal("controller", signal.SIGSTOP)
        stopped = rate(client, 10)
        print(f"controller stopped: {stopped:.2f} requests/s", flush=True)
        cluster.signal("controller", signal.SIGCONT)
        after = rate(client, 20)
        print(f"afterwards: {after:.2f} requests/s", flush=True)
        cluster.await_ready(*ROLES)
    print(f"stopped over the mean of both others: {stopped / statistics.mean((before, after)):.2f}")


def main() -> None:
    """Measure on a fresh cluster."""
    with (
        tempfile.TemporaryDirectory() as folder,
        controlled(Path(folder), smollm2_folder(), RegistryConfig(), **SETTINGS) as cluster,
    ):
        measure(cluster)


if __name__ == "__main__":
    main()
