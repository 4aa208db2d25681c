"""What the autoscaler sees of a load that comes and goes: `python -m tests.record_load > FILE.csv`.

A cluster of processes with small arenas; few streams, many, few, none.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anabranch import Client
from cluster import rpc
from cluster.config import TlsConfig
from cluster.errors import AnabranchError
from cluster.registry.settings import RegistryConfig
from controller.autoscaling.pool_watch import PoolWatch
from tests.controlled import controlled
from tests.models import random_prompt, tiny_model

PARTS: Sequence[tuple[float, int]] = ((20, 1), (40, 16), (20, 1), (40, 0))
"""(seconds, streams at once)."""
_EVERY_S = 1.0


def main() -> None:
    """Record, and print CSV."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_model(folder / "model", tokenizer=True)
        limits = {"attention__arena": "2MiB", "dense__max_batch": 8}
        with controlled(folder, model, RegistryConfig(), **limits) as cluster:
            members = ("gateway-0", "dense-0", "attention-0", "attention-1")
            for member in members:
                cluster.launch(member)
            cluster.await_ready(*members)
            with (
                rpc.channel(f"127.0.0.1:{cluster.port}", TlsConfig()) as channel,
                cluster.client("gateway-0") as client,
            ):
                _record(PoolWatch(channel), client)


def _record(watch: PoolWatch, client: Client) -> None:
    out = csv.writer(sys.stdout)
    out.writerow(["at_s", "pool_share", "waiting", "busy_share"])
    begin_s = time.monotonic()
    for span_s, streams in PARTS:
        end_s = time.monotonic() + span_s
        with ThreadPoolExecutor(max(1, streams)) as hands:
            for seed in range(streams):
                hands.submit(_load, client, end_s, seed)
            while time.monotonic() < end_s:
                found = watch.look()
                busy = "" if found.busy_share is None else f"{found.busy_share:.3f}"
                out.writerow([f"{found.at_s - begin_s:.1f}", f"{found.pool_share:.3f}", found.waiting, busy])
                threading.Event().wait(_EVERY_S)


def _load(client: Client, end_s: float, seed: int) -> None:
    number = 0
    while time.monotonic() < end_s:
        number += 1
        try:
            client.generate(
                token_ids=random_prompt(200, seed=seed * 1000 + number), max_tokens=200, ignore_eos=True
            ).text()
        except AnabranchError as error:
            sys.stderr.write(f"{error.message}\n")


if __name__ == "__main__":
    main()
