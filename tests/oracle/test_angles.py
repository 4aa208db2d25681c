"""Rotary angles at positions no present model reaches: as transformers computes them, to the last bit."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.models.llama import modeling_llama

from cluster.model_spec import ModelSpec
from tests.models import load_reference, tiny_model
from workers.dense.rope import RotaryEmbedding


def test_angles_near_two_million_are_transformers_bits(tmp_path: Path) -> None:
    """Float32 positions times float32 frequencies: both sides round alike at 1,900,000."""
    folder = tiny_model(tmp_path, max_position_embeddings=2**21)
    spec = ModelSpec.from_folder(folder)
    positions = torch.arange(1_900_000, 1_900_032)
    theirs = modeling_llama.LlamaRotaryEmbedding(load_reference(folder).config)
    cos, sin = theirs(torch.zeros(1), positions[None])
    ours = RotaryEmbedding(spec.rope, spec.head_size, torch.float32, torch.device("cpu")).tables(positions)
    half = spec.head_size // 2
    assert torch.equal(ours[0][:, 0], cos[0, :, :half])
    assert torch.equal(ours[1][:, 0], sin[0, :, :half])
