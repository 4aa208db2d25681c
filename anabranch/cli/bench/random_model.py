"""Models with random weights, made in seconds: of SmolLM2's shape, as fast and large as it, or of others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from cluster.model_spec import ModelSpec
from cluster.weight_shapes import weight_shapes

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}
_SCALE = 0.02


def write(folder: Path, changes: Mapping[str, object] | None = None, scale: float = _SCALE) -> None:
    """Write config.json, SmolLM2's with `changes`, and model.safetensors: matrices are normal with this
    `scale`, norms 1.
    """
    generator = torch.Generator().manual_seed(0)
    (folder / "config.json").write_text(json.dumps({**_CONFIG, **(changes or {})}))
    tensors = {
        name: (torch.randn(shape, generator=generator) * scale if len(shape) > 1 else torch.ones(shape)).to(
            torch.bfloat16
        )
        for name, shape in weight_shapes(ModelSpec.from_folder(folder))
    }
    save_file(tensors, folder / "model.safetensors")
