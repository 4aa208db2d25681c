"""A model of SmolLM2's shape with random weights: as fast and as large as the real one, made in seconds."""

from __future__ import annotations

import json
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


def write(folder: Path) -> None:
    """Write config.json and model.safetensors."""
    generator = torch.Generator().manual_seed(0)
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    tensors = {
        name: (torch.randn(shape, generator=generator) * _SCALE if len(shape) > 1 else torch.ones(shape)).to(
            torch.bfloat16
        )
        for name, shape in weight_shapes(ModelSpec.from_folder(folder))
    }
    save_file(tensors, folder / "model.safetensors")
