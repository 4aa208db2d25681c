"""Reading config.json: both spellings of rope, every family's own rules, and errors that name the file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import BrokenModelFolder, UnsupportedModel
from cluster.model_spec import ModelSpec
from cluster.rope_spec import RopeKind
from cluster.weight_files import read_stored_tensors

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "bos_token_id": 1,
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes config.json: the base, changed; a value of ... removes the key."""

    def write_config(**changes: object) -> Path:
        values = {key: value for key, value in (BASE | changes).items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return write_config


def write_tensor(path: Path, name: str, data: bytes, dtype: str = "F32") -> None:
    """A safetensors file with one tensor, made by hand."""
    shape = [len(data) // {"F32": 4, "BF16": 2}[dtype]]
    header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_plain_llama(write: Write) -> None:
    """Shape, derived head size, defaults of absent keys."""
    spec = ModelSpec.from_folder(write())
    assert (spec.layers, spec.query_heads, spec.kv_heads, spec.head_size) == (4, 4, 2, 16)
    assert (spec.rope.kind, spec.rope.theta, spec.tied_embeddings) == (RopeKind.DEFAULT, 10_000.0, False)
    assert spec.sliding_windows == (None,) * 4
    assert spec.uses_rope == (True,) * 4
    assert (spec.eos_token_ids, spec.bos_token_id) == ((2,), 1)
    assert spec.kv_bytes_per_token(2) == 2 * 4 * 2 * 16 * 2 == spec.geometry("bfloat16", 16).token_bytes


def test_key_value_heads_absent_and_null(write: Write) -> None:
    """Absent or null means as many as query heads for Llama; absent means 8 for Mistral."""
    assert ModelSpec.from_folder(write(num_key_value_heads=...)).kv_heads == 4
    assert ModelSpec.from_folder(write(num_key_value_heads=None)).kv_heads == 4
    mistral = write(architectures=["MistralForCausalLM"], num_key_value_heads=..., num_attention_heads=16)
    assert ModelSpec.from_folder(mistral).kv_heads == 8


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
def test_old_and_new_spelling_of_rope_are_one_spec(write: Write, kind: str) -> None:
    """`rope_theta` + `rope_scaling` (also with `type`) reads as `rope_parameters` does."""
    scaling = {
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 24, "mscale": 0},
    }[kind]
    new = ModelSpec.from_folder(write(rope_parameters={"rope_type": kind, "rope_theta": 5e4, **scaling}))
    for key in ("rope_type", "type"):
        old = ModelSpec.from_folder(write(rope_theta=5e4, rope_scaling={key: kind, **scaling}))
        assert old == new
    assert new.rope.kind == kind
    assert new.rope.theta == 5e4


def test_lengths_follow_the_kind_of_rope(write: Write) -> None:
    """Dynamic NTK ends at the original length; YaRN extends the configured one."""
    dynamic = ModelSpec.from_folder(write(rope_scaling={"type": "dynamic", "factor": 4.0}))
    assert dynamic.max_sequence_length == 512
    original = {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 128}
    assert ModelSpec.from_folder(write(rope_scaling=original)).max_sequence_length == 128
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert ModelSpec.from_folder(write(rope_scaling=yarn)).max_sequence_length == 2048


def test_mistral_window_absent_null_and_given(write: Write) -> None:
    """Absent is the published 4096, null is none."""
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert ModelSpec.from_folder(write(**mistral)).sliding_windows == (4096,) * 4
    assert ModelSpec.from_folder(write(**mistral, sliding_window=None)).sliding_windows == (None,) * 4
    assert ModelSpec.from_folder(write(**mistral, sliding_window=7)).sliding_windows == (7,) * 4


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwen_windows(write: Write, name: str) -> None:
    """Off unless `use_sliding_window`; then by `layer_types`, else from `max_window_layers` on."""
    qwen = {"architectures": [name], "sliding_window": 9}
    assert ModelSpec.from_folder(write(**qwen)).sliding_windows == (None,) * 4
    on = {**qwen, "use_sliding_window": True}
    assert ModelSpec.from_folder(write(**on, max_window_layers=3)).sliding_windows == (None, None, None, 9)
    types = ["sliding_attention", "full_attention"] * 2
    assert ModelSpec.from_folder(write(**on, layer_types=types)).sliding_windows == (9, None, 9, None)


def test_families_differ_in_biases_and_norms(write: Write) -> None:
    """Qwen2 biases q, k, v; Qwen3 norms heads of 128; Llama and SmolLM3 follow their flags."""
    qwen2 = ModelSpec.from_folder(write(architectures=["Qwen2ForCausalLM"]))
    assert (qwen2.biases.query_key_value, qwen2.biases.output, qwen2.query_key_norm) == (True, False, False)
    qwen3 = ModelSpec.from_folder(write(architectures=["Qwen3ForCausalLM"]))
    assert (qwen3.biases.query_key_value, qwen3.query_key_norm, qwen3.head_size) == (False, True, 128)
    llama = ModelSpec.from_folder(write(attention_bias=True, mlp_bias=True))
    assert (llama.biases.query_key_value, llama.biases.output, llama.biases.mlp) == (True, True, True)


def test_smollm3_layers_without_rope(write: Write) -> None:
    """Every fourth layer by default, or as listed; tied by default; theta two million."""
    smol = ModelSpec.from_folder(write(architectures=["SmolLM3ForCausalLM"]))
    assert smol.uses_rope == (True, True, True, False)
    assert smol.tied_embeddings
    assert smol.rope.theta == 2e6
    listed = write(architectures=["SmolLM3ForCausalLM"], no_rope_layers=[0, 1, 1, 0, 1])
    assert ModelSpec.from_folder(listed).uses_rope == (False, True, True, False)


def test_end_tokens_of_both_files_are_united(write: Write) -> None:
    """generation_config.json often knows more end tokens (chat models) than config.json."""
    folder = write(eos_token_id=[2, 7])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert ModelSpec.from_folder(folder).eos_token_ids == (2, 7, 9)


def test_parameters_of_smollm2_are_135_million(write: Write) -> None:
    """The published size of SmolLM2-135M: 134,515,008."""
    folder = write(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    assert ModelSpec.from_folder(folder).parameters == 134_515_008


def test_digest_covers_what_changes_the_cache_and_nothing_else(write: Write) -> None:
    """Rope, shape and weights change it; end tokens and context length do not."""
    spec = ModelSpec.from_folder(write())
    for other in (
        replace(spec, rope=replace(spec.rope, theta=9.0)),
        replace(spec, sliding_windows=(5, None, None, None)),
        replace(spec, weights_fingerprint="other"),
        replace(spec, kv_heads=4),
    ):
        assert other.digest != spec.digest
    assert replace(spec, eos_token_ids=(), context_length=9, stored_dtype="float16").digest == spec.digest
    assert ModelSpec.from_folder(write()).digest == spec.digest


def test_fingerprint_tells_two_weights_of_one_shape_apart(write: Write) -> None:
    """A fine-tune has the same config.json and must not meet its parent's cache."""
    folder = write()
    digests = set()
    for content in (b"\0" * 8192, b"\0" * 4096 + b"\1" + b"\0" * 4095):
        write_tensor(folder / "model.safetensors", "weight", content)
        digests.add(ModelSpec.from_folder(folder).digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": ...}, "supported are"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer type"),
        ({"head_dim": 15}, "odd"),
        ({"dtype": "float8"}, "float8"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    write: Write, changes: dict[str, Any], names: str
) -> None:
    """An unknown architecture or option never runs as something else."""
    with pytest.raises(UnsupportedModel, match=names):
        ModelSpec.from_folder(write(**changes))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"hidden_size": ...}, "hidden_size"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": 100}, "eos_token_id"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ],
)
def test_wrong_values_are_named(write: Write, changes: dict[str, Any], names: str) -> None:
    """The error names file and key, and says to correct it."""
    with pytest.raises(BrokenModelFolder, match=rf"config\.json.*{names}"):
        ModelSpec.from_folder(write(**changes))


def test_missing_and_malformed_files_are_named(tmp_path: Path) -> None:
    """No config.json, one that is no JSON, one that is no object."""
    with pytest.raises(BrokenModelFolder, match=r"config\.json is missing"):
        ModelSpec.from_folder(tmp_path)
    for content in (b"{", b"[]", b"\xff\xfe"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(BrokenModelFolder, match=r"config\.json"):
            ModelSpec.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "truncated"),
        (b"\xff" * 8, "truncated"),
        (struct.pack("<Q", 4) + b"nope", "header"),
        (struct.pack("<Q", 2) + b"[]", "header"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "header"),
    ],
)
def test_broken_weight_files_are_named(tmp_path: Path, content: bytes, what: str) -> None:
    """Whatever the bytes, the error names the file and what to do."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(BrokenModelFolder, match=rf"model\.safetensors .*{what}.*download"):
        read_stored_tensors(tmp_path)


def test_truncated_missing_and_overlong_weights_are_named(tmp_path: Path) -> None:
    """Cut anywhere in the data, not there at all, or listed in the index only."""
    with pytest.raises(BrokenModelFolder, match="neither"):
        read_stored_tensors(tmp_path)
    path = tmp_path / "model.safetensors"
    write_tensor(path, "weight", b"\0" * 64)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(BrokenModelFolder, match="truncated: weight"):
        read_stored_tensors(tmp_path)
    index = {"weight_map": {"weight": "model-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BrokenModelFolder, match=r"model-00001\.safetensors is missing"):
        read_stored_tensors(tmp_path)


def test_an_index_cannot_reach_outside_the_folder(tmp_path: Path) -> None:
    """A file name with a path in it is refused, even where such a file exists."""
    write_tensor(tmp_path / "secret.safetensors", "weight", b"\0" * 4)
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"weight_map": {"weight": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BrokenModelFolder, match="secret"):
        read_stored_tensors(folder)
