"""The KV cache of a request is not in the dense process, however long the context."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.models import random_prompt, tiny_model
from tests.processes import ProcessCluster, process_cluster

pytestmark = pytest.mark.system  # many processes: minutes rather than seconds

HEADS, HEAD_SIZE, LAYERS = 4, 128, 4
TOKEN_BYTES = LAYERS * 2 * HEADS * HEAD_SIZE * 4
SHORT, LONG = 500, 3000


def _resident_bytes_after(cluster: ProcessCluster, prompt: Sequence[int]) -> int:
    """Resident memory of the dense process while a request with this prompt decodes."""
    with cluster.client() as client:
        stream = client.generate(token_ids=prompt, temperature=0.0, max_tokens=8, ignore_eos=True)
        for event in stream:
            if getattr(event, "token_ids", ()):
                status = Path(f"/proc/{cluster.processes['dense-0'].pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024


def test_the_dense_process_does_not_grow_with_the_context(tmp_path: Path) -> None:
    """From 500 to 3,000 tokens the cache grows by 40 MB, and the dense process by less than a fifth of it."""
    model = tiny_model(
        tmp_path / "model",
        tokenizer=True,
        max_position_embeddings=4096,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_SIZE,
    )
    overrides = {"attention.replicas": 1, "attention.arena": "128MiB"}
    with process_cluster(model, tmp_path, overrides) as cluster:
        for seed in range(2):  # buffers of steps and lanes find their size
            _resident_bytes_after(cluster, random_prompt(SHORT, seed))
        short = _resident_bytes_after(cluster, random_prompt(SHORT, seed=2))
        long = _resident_bytes_after(cluster, random_prompt(LONG, seed=3))
        cluster.assert_nothing_leaks()
    cache_growth = (LONG - SHORT) * TOKEN_BYTES
    assert long - short < cache_growth / 5, f"{(long - short) / 2**20:.1f} MiB"
