"""A tiny float32 model and its tokenizer, made in code, whose best logits are seldom close to each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_HIDDEN, _INNER, _LAYERS, _HEADS, _KV_HEADS = 64, 96, 2, 4, 2
_END = "<|end|>"
VOCABULARY_SIZE = 257
"""All bytes, and the end of a text."""

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "vocab_size": VOCABULARY_SIZE,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "hidden_act": "silu",
    "eos_token_id": VOCABULARY_SIZE - 1,
}


def write(folder: Path, context_tokens: int = 2048) -> None:
    """Write config.json, model.safetensors and the tokenizer's files."""
    generator = np.random.default_rng(0)
    told = _CONFIG | {"max_position_embeddings": context_tokens}
    (folder / "config.json").write_text(json.dumps(told))
    save_file(
        {name: _drawn(generator, name, shape) for name, shape in _shapes()}, folder / "model.safetensors"
    )
    _write_tokenizer(folder)


def _drawn(generator: np.random.Generator, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Weights of unit gain, norms away from 1, and a loud head: logits spread by about 5."""
    noise = generator.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return 1 + noise * np.float32(0.2)
    gain = 0.6 if name in ("model.embed_tokens.weight", "lm_head.weight") else 1.3 / shape[1] ** 0.5
    return noise * np.float32(gain)


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    kv_width = _HIDDEN // _HEADS * _KV_HEADS
    yield "model.embed_tokens.weight", (VOCABULARY_SIZE, _HIDDEN)
    yield "lm_head.weight", (VOCABULARY_SIZE, _HIDDEN)
    yield "model.norm.weight", (_HIDDEN,)
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}."
        yield prefix + "self_attn.q_proj.weight", (_HIDDEN, _HIDDEN)
        yield prefix + "self_attn.k_proj.weight", (kv_width, _HIDDEN)
        yield prefix + "self_attn.v_proj.weight", (kv_width, _HIDDEN)
        yield prefix + "self_attn.o_proj.weight", (_HIDDEN, _HIDDEN)
        yield prefix + "mlp.gate_proj.weight", (_INNER, _HIDDEN)
        yield prefix + "mlp.up_proj.weight", (_INNER, _HIDDEN)
        yield prefix + "mlp.down_proj.weight", (_HIDDEN, _INNER)
        yield prefix + "input_layernorm.weight", (_HIDDEN,)
        yield prefix + "post_attention_layernorm.weight", (_HIDDEN,)


def _write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(_END, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": _END}))
