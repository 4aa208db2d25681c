"""What a stopped controller costs new requests: `python -m tests.controller_stopped [--json FILE]`.

SmolLM2 in float32, a gateway, a dense and two attention workers, one thread each. Four clients ask one short
request after the other: for a minute undisturbed, for one with the controller stopped (SIGSTOP), and for one
afterwards. Prints requests per second of each, and the ratio of the second to the first and third; exit
status 1 where that is below what is asked.
"""

import argparse
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from anabranch import Client
from anabranch.cli.bench import results_file
from anabranch.cli.bench.records import Record, ratio
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
LEAST = 0.9
"""Of the usual rate of new requests."""


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


def measure(cluster: ControlledCluster) -> Record:
    """Three minutes: the rate with the controller stopped over that of the two others."""
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
    found = ratio(
        ("stopped", [stopped]),
        ("running", [before, after]),
        "1/s",
        at_least=LEAST,
        settings={"clients": CLIENTS},
    )
    print(f"stopped over the median of both others: {found['value']:.2f} (asked {LEAST})")
    return found


def main() -> int:
    """Measure on a fresh cluster."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rates here, beside what else is there")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        controlled(Path(folder), smollm2_folder(), RegistryConfig(), **SETTINGS) as cluster,
    ):
        found = measure(cluster)
    if options.json:
        results_file.write(options.json, results_file.stamp({"controller_stopped": found}))
    return int(found["value"] < LEAST)


if __name__ == "__main__":
    sys.exit(main())
