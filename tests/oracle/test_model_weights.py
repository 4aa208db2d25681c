"""Loading: little more memory than the weights, any sharding, any dtype, and errors that name the tensor."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import BrokenModelFolder
from cluster.model_spec import ModelSpec
from tests.memory_attention import MemoryAttention, run_step
from tests.models import random_prompt, tiny_model
from workers.dense.model import Decoder
from workers.dense.weights import load_weights

CPU = torch.device("cpu")
MEBIBYTE = 2**20

BIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}
"""151 million parameters: 302 MB in bfloat16."""

MEASURE = """
import sys, torch
from cluster.model_spec import ModelSpec
from workers.dense.weights import load_weights

def peak_bytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

spec = ModelSpec.from_folder(sys.argv[1])
torch.zeros(8).to(torch.bfloat16)
before = peak_bytes()
weights = load_weights(spec, sys.argv[1], getattr(torch, sys.argv[2]), torch.device("cpu"))
print(before, peak_bytes())
"""


def tensor_shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a plain Llama's tensors."""
    hidden, inner, width = spec.hidden_size, spec.intermediate_size, spec.query_heads * spec.head_size
    yield "model.embed_tokens.weight", (spec.vocabulary_size, hidden)
    yield "lm_head.weight", (spec.vocabulary_size, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        yield from ((prefix + f"self_attn.{name}_proj.weight", (width, hidden)) for name in "qkvo")
        yield from ((prefix + f"mlp.{name}_proj.weight", (inner, hidden)) for name in ("gate", "up"))
        yield prefix + "mlp.down_proj.weight", (hidden, inner)
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)


def write_zeros(folder: Path, dtype: str) -> ModelSpec:
    """The big model with all weights zero, as a sparse file: instant to write, real to read."""
    (folder / "config.json").write_text(json.dumps(BIG))
    spec, header, end = ModelSpec.from_folder(folder), {}, 0
    for name, shape in tensor_shapes(spec):
        start, end = end, end + torch.Size(shape).numel() * {"F32": 4, "BF16": 2}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return spec


@pytest.mark.parametrize(
    ("stored", "target"), [("BF16", "bfloat16"), ("F32", "bfloat16"), ("BF16", "float32")]
)
def test_peak_memory_is_little_above_the_weights(tmp_path: Path, stored: str, target: str) -> None:
    """Loading grows a process by less than 1.1 x weights + 50 MB, and peaks under 1.3 x weights + 600 MB."""
    spec = write_zeros(tmp_path, stored)
    weights_bytes = spec.parameters * getattr(torch, target).itemsize
    command = [sys.executable, "-c", MEASURE, str(tmp_path), target]
    output = subprocess.run(command, capture_output=True, check=True, text=True, timeout=100).stdout
    before, peak = map(int, output.split())
    assert peak - before < 1.1 * weights_bytes + 50 * MEBIBYTE
    assert peak < 1.3 * weights_bytes + 600 * MEBIBYTE
    assert peak - before > 0.9 * weights_bytes, "the weights were read, not merely promised"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with biases and norms of heads; do not write into it."""
    return tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3", attention_bias=True)


def logits_of(decoder: Decoder) -> torch.Tensor:
    """Logits of a fixed prompt."""
    rows = [(0, position, token_id) for position, token_id in enumerate(random_prompt(9, seed=0))]
    return decoder.logits(run_step(decoder, MemoryAttention(decoder.spec), rows))


def test_sharded_weights_are_the_same_model(tmp_path: Path, folder: Path) -> None:
    """Several files behind an index give the same bits, and the same digest, as one file."""
    sharded = tiny_model(tmp_path, "qwen3", attention_bias=True, shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, many = Decoder.from_folder(folder), Decoder.from_folder(sharded)
    assert torch.equal(logits_of(one), logits_of(many))
    assert one.spec.digest == many.spec.digest


def test_conversion_rounds_like_torch(folder: Path) -> None:
    """Float32 files load as bfloat16 and float16 with every element rounded to nearest."""
    spec, stored = ModelSpec.from_folder(folder), load_file(folder / "model.safetensors")
    for dtype in (torch.bfloat16, torch.float16):
        layer = load_weights(spec, folder, dtype, CPU).layers[1]
        attention = "model.layers.1.self_attn."
        fused = torch.cat([stored[f"{attention}{name}_proj.weight"] for name in "kv"]).to(dtype)
        assert torch.equal(layer.key_value.weight, fused)
        assert torch.equal(layer.query.weight, stored[f"{attention}q_proj.weight"].to(dtype))
        assert layer.key_value.bias is not None
        assert layer.key_value.bias.shape == (2 * spec.kv_heads * spec.head_size,)


def test_progress_counts_every_byte_once(folder: Path) -> None:
    """Progress grows to the total and says the total from the start."""
    reports: list[tuple[int, int]] = []
    load_weights(
        ModelSpec.from_folder(folder),
        folder,
        torch.float32,
        CPU,
        lambda done, total: reports.append((done, total)),
    )
    data_bytes = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert {total for _, total in reports} == {data_bytes}
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert reports[-1][0] == data_bytes
    assert reports[-2][0] == data_bytes, "the sum of the tensors, not the closing report alone"


def test_a_tied_head_is_the_embedding_itself(tmp_path: Path) -> None:
    """Tied embeddings are held once, whether or not the file repeats them."""
    path = tiny_model(tmp_path, "llama", tied=True)
    weights = load_weights(ModelSpec.from_folder(path), path, torch.float32, CPU)
    assert weights.head.weight is weights.embedding


def test_data_at_odd_addresses_is_read(tmp_path: Path, folder: Path) -> None:
    """Foreign writers need not pad the header: data then starts at any byte."""
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    whole = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    shifted = struct.pack("<Q", length + 1) + whole[8 : 8 + length] + b" " + whole[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(shifted)
    expected = logits_of(Decoder.from_folder(folder))
    assert torch.equal(logits_of(Decoder.from_folder(tmp_path)), expected)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("missing", r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        ("misshapen", r"up_proj\.weight has shape \[3, 3\], config\.json asks for \[96, 64\]"),
        ("integers", r"up_proj\.weight is I64; convert it to one of F32, F16, BF16"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, folder: Path, spoil: str, message: str) -> None:
    """Missing, misshapen or of a type that is no weight: the error names tensor and remedy."""
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    up = tensors.pop(name)
    if spoil == "misshapen":
        tensors[name] = torch.zeros(3, 3)
    if spoil == "integers":
        tensors[name] = up.to(torch.int64)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BrokenModelFolder, match=message):
        Decoder.from_folder(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path, folder: Path) -> None:
    """A tokenizer folder has a spec but cannot be served."""
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert ModelSpec.from_folder(tmp_path).weights_fingerprint == ""
    with pytest.raises(BrokenModelFolder, match=r"neither model\.safetensors nor"):
        Decoder.from_folder(tmp_path)
