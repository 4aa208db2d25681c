"""One sequence over device and host memory, moving between them; roles as processes without Ray."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import config as configuration
from tests.models import random_prompt, reference_tokens, tiny_model
from tests.processes import ProcessCluster, Spawn, process_cluster, spawn_here

BLOCK_TOKENS = 16
SHARD_TOKENS = 512
PROMPT_TOKENS = 960
"""Two shards but for the answer's first tokens: half of the blocks lie in each of two arenas."""
TOKENS_LEAST = 64
MOST: Mapping[str, Any] = {"max_position_embeddings": 4096}

BILLION: Mapping[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""The layers of a Llama of the 1B class; the vocabulary stays that of the tests' tokenizer."""

FIRST, SECOND, LAST = "attention-0", "attention-1", "attention-2"
ARENAS = {FIRST: "400MiB", SECOND: "399MiB", LAST: "300MiB"}
"""The larger are filled first: FIRST gets the first shard, SECOND the second and what leaves FIRST."""


def spawn_on(devices: Mapping[str, str]) -> Spawn:
    """Starts each attention worker of `devices` with a device and an arena of its own."""

    def spawn(worker_id: str, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        command = list(command)
        if worker_id in devices:
            place = command.index("--config") + 1
            own = log.with_suffix(".yaml")
            overrides = {"attention.device": devices[worker_id], "attention.arena": ARENAS[worker_id]}
            own.write_text(configuration.load(Path(command[place]), overrides).to_yaml())
            command[place] = str(own)
        return spawn_here(worker_id, command, log)

    return spawn


@dataclass
class Evacuation:
    """Empties FIRST, whose shard goes to SECOND, and then SECOND, whose shards go to LAST, beside a stream.

    split --FIRST is told to leave--> leaving --it has left--> SECOND is told --it has left--> over
    """

    cluster: ProcessCluster
    leaving: list[subprocess.Popen[bytes]] = field(default_factory=list)
    is_over: bool = False

    def advance(self) -> None:
        """Go on if what left has left."""
        if self.is_over or (self.leaving and self.leaving[-1].poll() is None):
            return
        if len(self.leaving) == 2:
            assert [process.returncode for process in self.leaving] == [0, 0]
            self.is_over = True
            return
        if not self.leaving:
            self._assert_half_in_each()
        self.leaving.append(self.cluster.drain((FIRST, SECOND)[len(self.leaving)]))

    def _assert_half_in_each(self) -> None:
        held = {name: account.blocks for name, account in self.cluster.audits().items()}
        used = {name: blocks.capacity - blocks.free for name, blocks in held.items()}
        half = SHARD_TOKENS // BLOCK_TOKENS
        assert used[FIRST] == half
        assert abs(used[SECOND] - half) <= 4, used


def generate(cluster: ProcessCluster, prompt: Sequence[int], tokens: int) -> list[int]:
    """The answer, during which the sequence's blocks move from FIRST to SECOND and from there to LAST."""
    received: list[int] = []
    evacuation = Evacuation(cluster)
    with cluster.client() as client:
        stream = client.generate(
            token_ids=prompt, temperature=0.0, max_tokens=tokens, ignore_eos=True, deadline_s=600
        )
        for event in stream:
            received += getattr(event, "token_ids", ())
            if 4 <= len(received) < tokens:
                evacuation.advance()
    assert evacuation.is_over, "the answer came before the blocks had moved: ask for more tokens"
    return received


def assert_transformers_tokens(folder: Path, dense: str, attention: Mapping[str, str], tokens: int) -> None:
    """Serve the model of `folder` with its parts on devices; the tokens must be those transformers gives."""
    prompt = random_prompt(PROMPT_TOKENS, seed=21)
    (reference,) = reference_tokens(folder, [prompt], tokens, dense)
    sharp = reference.sharp_length()
    assert sharp >= TOKENS_LEAST, "a comparison that stops early proves nothing: take another seed"
    overrides = {
        "dense.device": dense,
        "attention.replicas": len(attention),
        "attention.block_tokens": BLOCK_TOKENS,
        "placement.shard_tokens": SHARD_TOKENS,
        "controller.drain_grace_s": 60,
        "controller.expiry_ms": 20_000,
    }
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the reference is done; the roles have the device to themselves
    with process_cluster(folder, folder.parent, overrides, spawn_on(attention)) as cluster:
        received = generate(cluster, prompt, tokens)
        assert len(received) == tokens
        assert received[:sharp] == list(reference.tokens[:sharp])
        cluster.assert_nothing_leaks()


@pytest.mark.system
def test_a_sequence_moves_through_three_host_arenas(tmp_path: Path) -> None:
    """What the test on the device does, with a tiny model and no device."""
    folder = tiny_model(tmp_path / "model", "llama", tokenizer=True, **MOST)
    attention = {FIRST: "cpu", SECOND: "cpu", LAST: "cpu"}
    assert_transformers_tokens(folder, "cpu", attention, tokens=1200)


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_a_sequence_moves_from_device_to_host_and_back(tmp_path: Path) -> None:
    """A billion random weights in float32, dense on the device, half of the blocks there and half on the
    host; all of them go to the host, then all to the device, while it decodes; the tokens are transformers'.
    """
    folder = tiny_model(tmp_path / "model", "llama", tokenizer=True, **MOST, **BILLION)
    attention = {FIRST: "cuda", SECOND: "cpu", LAST: "cuda"}
    assert_transformers_tokens(folder, "cuda", attention, tokens=1000)
