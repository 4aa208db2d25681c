"""Which tensors a decoder has, by Hugging Face's names: a folder can be judged by its headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from cluster.errors import BrokenModelFolder
from cluster.model_spec import ModelSpec
from cluster.weight_files import StoredTensor

Shape = tuple[int, ...]


def weight_shapes(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    """(name, shape) of every tensor that serving reads."""
    table = (spec.vocabulary_size, spec.hidden_size)
    yield "model.embed_tokens.weight", table
    for layer in range(spec.layers):
        for name, shape in _layer_shapes(spec):
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (spec.hidden_size,)
    if not spec.tied_embeddings:
        yield "lm_head.weight", table


def _layer_shapes(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    query, kv = spec.query_heads * spec.head_size, spec.kv_heads * spec.head_size
    biases = spec.biases
    projections = (
        ("self_attn.q_proj", query, hidden, biases.query_key_value),
        ("self_attn.k_proj", kv, hidden, biases.query_key_value),
        ("self_attn.v_proj", kv, hidden, biases.query_key_value),
        ("self_attn.o_proj", hidden, query, biases.output),
        ("mlp.gate_proj", inner, hidden, biases.mlp),
        ("mlp.up_proj", inner, hidden, biases.mlp),
        ("mlp.down_proj", hidden, inner, biases.mlp),
    )
    for name, outputs, inputs, is_biased in projections:
        yield f"{name}.weight", (outputs, inputs)
        if is_biased:
            yield f"{name}.bias", (outputs,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{name}.weight", (hidden,)
    if spec.query_key_norm:
        for name in ("q_norm", "k_norm"):
            yield f"self_attn.{name}.weight", (spec.head_size,)


def require_shapes(folder: Path, spec: ModelSpec, stored: Mapping[str, StoredTensor]) -> None:
    """Raises BrokenModelFolder naming the first tensor that is missing or has another shape than config.json
    asks for.
    """
    advice = "check that weights and config.json belong together"
    for name, shape in weight_shapes(spec):
        tensor = stored.get(name)
        if tensor is None:
            raise BrokenModelFolder(f"{folder}: tensor {name} is missing: {advice}")
        if tensor.shape != shape:
            raise BrokenModelFolder(
                f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}, config.json asks for "
                f"{list(shape)}: {advice}"
            )
