"""Run on one host: a cluster whose attention worker is on another; prints the tokens it generates.

`python -m tests.system.two_hosts MODEL FOLDER TRANSPORT NEAR FAR_NAMESPACE FAR`, where NEAR and FAR are the
hosts' addresses. The last line is JSON: the output tokens, and the worker that held the cache.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.models import random_prompt
from tests.processes import process_cluster, spawn_here
from tests.system.hosts import Host

PROMPT = random_prompt(90, seed=7)
TOKENS = 16


def main(model: str, folder: str, transport: str, near: str, far_namespace: str, far: str) -> None:
    """Serve one request across the two hosts."""
    remote = Host(far_namespace, far)

    def spawn(worker_id: str, command: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
        if not worker_id.startswith("attention"):
            return spawn_here(worker_id, command, log)
        with log.open("ab") as output:
            return remote.start(command, stdout=output, stderr=output)

    overrides = {
        **{f"{role}.host": near for role in ("controller", "gateway", "dense")},
        "attention.host": far,
        "attention.replicas": 1,
        "security.insecure": True,
        "lanes.transports": [transport],
        "lanes.fenced_network": transport == "tcp",
    }
    with process_cluster(Path(model), Path(folder), overrides, spawn) as cluster:
        with cluster.client() as client:
            stream = client.generate(token_ids=PROMPT, temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
            tokens: list[int] = []
            holders: list[str] = []
            for event in stream:
                tokens += getattr(event, "token_ids", ())
                if tokens and not holders:
                    holders = [shard.worker_id for shard in client.topology(stream.request_id).shards]
        cluster.assert_nothing_leaks()
    print(json.dumps({"tokens": tokens, "holders": holders}))


if __name__ == "__main__":
    main(*sys.argv[1:])
