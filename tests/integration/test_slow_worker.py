"""One attention worker much slower than the other: nobody takes it for dead, and no token changes."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.models import random_prompt, reference_tokens, tiny_model
from tests.processes import process_cluster
from tests.serving import Reader

pytestmark = pytest.mark.system  # many processes: minutes rather than seconds

TOKENS = 100
STOPPED_S, RUNNING_S = 0.06, 0.02
"""The slow one has a quarter of its time."""


@contextmanager
def slowed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A process that is stopped most of the time, again and again, and runs at the end."""
    over = threading.Event()

    def stop_and_go() -> None:
        while not over.wait(RUNNING_S):
            process.send_signal(signal.SIGSTOP)
            over.wait(STOPPED_S)
            process.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        process.send_signal(signal.SIGCONT)


def test_a_slow_worker_among_fast_ones_slows_and_breaks_nothing(tmp_path: Path) -> None:
    """Sequences over both: they end with transformers' tokens, the same processes are members all the while,
    and nothing was computed twice.
    """
    folder = tiny_model(tmp_path, "llama", tokenizer=True)
    prompts = [random_prompt(40 + 20 * index, seed=index) for index in range(3)]
    references = reference_tokens(folder, prompts, TOKENS)
    overrides = {"attention.block_tokens": 8, "placement.shard_tokens": 32, "attention.replicas": 2}
    with process_cluster(folder, tmp_path, overrides) as cluster, cluster.client() as client:
        before = {(member.worker_id, member.epoch) for member in cluster.members()}
        with slowed(cluster.processes["attention-1"]):
            readers = [Reader(client, token_ids=prompt, max_tokens=TOKENS) for prompt in prompts]
            results = [reader.result() for reader in readers]
        for result, reference in zip(results, references, strict=True):
            sharp = reference.tokens[: reference.sharp_length()]
            assert len(result.token_ids()) == TOKENS
            assert list(result.token_ids()[: len(sharp)]) == list(sharp)
        assert {(member.worker_id, member.epoch) for member in cluster.members()} == before
        log = cluster.log("dense-0")
        assert "peer_ready" in log
        assert "step_aborted" not in log
        assert "shards_lost" not in log
        cluster.assert_nothing_leaks()
