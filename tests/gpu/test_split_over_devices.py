"""One sequence, half of its cache in device memory and half in the host's, roles as processes without Ray."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import config as configuration
from tests.models import NEAR_TIE, random_prompt, reference_tokens, tiny_model
from tests.processes import ProcessCluster, Spawn, process_cluster, spawn_here

BLOCK_TOKENS = 16
SHARD_TOKENS = 240
PROMPT_TOKENS = 416
TOKENS = 64
"""Prompt and answer are two shards."""

BILLION: Mapping[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
"""The layers of a Llama of the 1B class; the vocabulary stays that of the tests' tokenizer."""


def spawn_on(devices: Mapping[str, str]) -> Spawn:
    """Starts each attention worker named in `devices` with its own `attention.device`."""

    def spawn(worker_id: str, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        command = list(command)
        if worker_id in devices:
            place = command.index("--config") + 1
            own = log.with_suffix(".yaml")
            overrides = {"attention.device": devices[worker_id]}
            own.write_text(configuration.load(Path(command[place]), overrides).to_yaml())
            command[place] = str(own)
        return spawn_here(worker_id, command, log)

    return spawn


def blocks_held(cluster: ProcessCluster) -> dict[str, int]:
    """By attention worker."""
    return {
        worker_id: account.blocks.capacity - account.blocks.free
        for worker_id, account in cluster.audits().items()
    }


def generate_half_and_half(cluster: ProcessCluster, prompt: Sequence[int]) -> list[int]:
    """The answer's tokens; in the middle of the stream each worker must hold half of the blocks."""
    received: list[int] = []
    was_looked_at = False
    with cluster.client() as client:
        for event in client.generate(
            token_ids=prompt, temperature=0.0, max_tokens=TOKENS, ignore_eos=True, deadline_s=240
        ):
            received += getattr(event, "token_ids", ())
            if len(received) >= TOKENS // 2 and not was_looked_at:
                # The sequence is running and lies in both arenas: what moves its blocks acts here.
                held = blocks_held(cluster)
                assert max(held.values()) - min(held.values()) <= 4, held
                assert sum(held.values()) >= (PROMPT_TOKENS + len(received)) // BLOCK_TOKENS
                was_looked_at = True
    assert was_looked_at
    return received


def assert_transformers_tokens(
    folder: Path, tmp_path: Path, dense: str, attention: Mapping[str, str]
) -> None:
    """Serve the model of `folder` with its parts on devices; the tokens must be those transformers gives."""
    prompt = random_prompt(PROMPT_TOKENS, seed=21)
    reference = reference_tokens(folder, [prompt], TOKENS, dense)[0]
    assert min(reference.gaps) > NEAR_TIE, "a comparison that stops early proves nothing: take another seed"
    overrides = {
        "dense.device": dense,
        "attention.replicas": len(attention),
        "attention.arena": "256MiB",
        "attention.block_tokens": BLOCK_TOKENS,
        "placement.shard_tokens": SHARD_TOKENS,
        "controller.expiry_ms": 20_000,
    }
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the reference is done; the roles have the device to themselves
    with process_cluster(folder, tmp_path, overrides, spawn_on(attention)) as cluster:
        assert generate_half_and_half(cluster, prompt) == list(reference.tokens)
        cluster.assert_nothing_leaks()


def test_half_of_a_sequence_in_each_of_two_host_arenas(tmp_path: Path) -> None:
    """What the test on the device does, with a tiny model and no device."""
    folder = tiny_model(tmp_path / "model", "llama", tokenizer=True)
    assert_transformers_tokens(folder, tmp_path, "cpu", {"attention-0": "cpu", "attention-1": "cpu"})


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_half_of_a_sequence_on_the_device_and_half_on_the_host(tmp_path: Path) -> None:
    """A billion random weights in float32, dense on the device: 64 tokens equal transformers'."""
    folder = tiny_model(tmp_path / "model", "llama", tokenizer=True, **BILLION)
    assert_transformers_tokens(folder, tmp_path, "cuda", {"attention-0": "cuda", "attention-1": "cpu"})
