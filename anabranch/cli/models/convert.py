"""A GGUF file as a Hugging Face folder: dequantized once, stored in bfloat16.

Only the Llama architecture is converted. Its GGUF files hold the rows of the query and key projections in
the order of interleaved rotary embeddings (the pairs of a head lie side by side); Hugging Face rotates
halves (a pair lies head size / 2 apart), so the rows are put back in that order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from anabranch.cli.models.tokenizer_files import TokenizerFacts, write_tokenizer
from cluster.errors import BrokenModelFolder, ConfigError, UnsupportedModel

CONVERTER_VERSION = 1
"""Raised whenever the folder written from the same GGUF file changes."""

Floats = npt.NDArray[np.float32]

_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOKEN_NAMES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def check_converter() -> None:
    """Raise `ConfigError` unless the optional packages for converting are installed."""
    try:
        import gguf  # noqa: F401
        import ml_dtypes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"converting a model needs {error.name}: run `pip install 'anabranch[convert]'`"
        ) from error


def convert_gguf(gguf_path: Path, folder: Path, advance: Callable[[int], None]) -> None:
    """Write config, tokenizer and bfloat16 weights into the existing, empty `folder`.

    `advance` is told the bytes of GGUF tensors done so far. Raises `ConfigError` without the optional
    packages, `UnsupportedModel` for another architecture, `BrokenModelFolder` for an unreadable file.
    """
    check_converter()
    import gguf

    try:
        reader = gguf.GGUFReader(gguf_path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise BrokenModelFolder(f"{gguf_path} is no readable GGUF file: {error}") from error
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts.get("general.architecture") != "llama":
        raise UnsupportedModel(
            f"{gguf_path}: architecture {facts.get('general.architecture')!r} is not llama"
        )
    tensors = _read_tensors(reader, facts, advance)
    _write_configs(facts, tied="lm_head.weight" not in tensors, folder=folder)
    write_tokenizer(_tokenizer_facts(facts), folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def to_half_rotation(weight: Floats, heads: int) -> Floats:
    """Rows [heads * head size, columns] from interleaved to half-split rotary order.

    Within a head, row 2i goes to i and row 2i+1 to head size / 2 + i.
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def _read_tensors(
    reader: Any,
    facts: Mapping[str, Any],
    advance: Callable[[int], None],
) -> dict[str, npt.NDArray[Any]]:
    """Every tensor by its Hugging Face name, in bfloat16; one float32 tensor is alive at a time."""
    import gguf
    import ml_dtypes

    heads = {
        "q_proj": int(facts["llama.attention.head_count"]),
        "k_proj": int(facts["llama.attention.head_count_kv"]),
    }
    converted: dict[str, npt.NDArray[Any]] = {}
    done_bytes = 0
    for tensor in reader.tensors:
        name = _hugging_face_name(tensor.name)
        weight: Floats = gguf.dequantize(tensor.data, tensor.tensor_type)
        projection = name.split(".")[-2]
        if projection in heads:
            weight = to_half_rotation(weight, heads[projection])
        converted[name] = weight.astype(ml_dtypes.bfloat16)
        done_bytes += int(tensor.n_bytes)
        advance(done_bytes)
    return converted


def _hugging_face_name(gguf_name: str) -> str:
    if gguf_name in _OUTER_NAMES:
        return _OUTER_NAMES[gguf_name]
    match gguf_name.split("."):
        case ["blk", layer, part, "weight"] if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
    raise UnsupportedModel(f"the GGUF tensor {gguf_name!r} has no counterpart in a Llama model")


def _write_configs(facts: Mapping[str, Any], tied: bool, folder: Path) -> None:
    token_ids = {
        f"{name}_id": int(facts[key])
        for name, key in _TOKEN_NAMES.items()
        if key in facts and name != "unk_token"
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "hidden_size": int(facts["llama.embedding_length"]),
        "intermediate_size": int(facts["llama.feed_forward_length"]),
        "num_hidden_layers": int(facts["llama.block_count"]),
        "num_attention_heads": int(facts["llama.attention.head_count"]),
        "num_key_value_heads": int(facts["llama.attention.head_count_kv"]),
        "head_dim": int(facts["llama.rope.dimension_count"]),
        "max_position_embeddings": int(facts["llama.context_length"]),
        "rope_theta": _shortest(facts["llama.rope.freq_base"]),
        "rms_norm_eps": _shortest(facts["llama.attention.layer_norm_rms_epsilon"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        **token_ids,
    }
    for name, content in {"config.json": config, "generation_config.json": token_ids}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: 1e-05 where a float64 would read 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _tokenizer_facts(facts: Mapping[str, Any]) -> TokenizerFacts:
    return TokenizerFacts(
        model=facts["tokenizer.ggml.model"],
        pre_tokenizer=facts["tokenizer.ggml.pre"],
        tokens=facts["tokenizer.ggml.tokens"],
        kinds=facts["tokenizer.ggml.token_type"],
        merges=facts["tokenizer.ggml.merges"],
        named_ids={name: int(facts[key]) for name, key in _TOKEN_NAMES.items() if key in facts},
        add_bos=bool(facts.get("tokenizer.ggml.add_bos_token", False)),
        chat_template=facts.get("tokenizer.chat_template"),
        context_length=int(facts["llama.context_length"]),
    )
