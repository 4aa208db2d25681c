"""What a model folder holds and what serving it costs, without loading a weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anabranch.cli.models.provenance import read_licence
from cluster.config_reader import ConfigReader
from cluster.errors import BrokenModelFolder
from cluster.model_spec import ModelSpec
from cluster.weight_files import read_stored_tensors


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """Facts about one model folder, named as `anabranch model inspect --json` prints them."""

    folder: str
    architecture: str
    parameters: int
    layers: int
    hidden_size: int
    query_heads: int
    kv_heads: int
    head_size: int
    vocabulary_size: int
    tied_embeddings: bool
    context_length: int
    sliding_window: int | None
    """The smallest window of any layer; None where every layer sees everything."""
    rope: str
    stored_dtype: str
    weight_bytes: int
    kv_bytes_per_token_float32: int
    kv_bytes_per_token_bfloat16: int
    tokenizer: str
    has_chat_template: bool
    licence: str | None
    files: dict[str, int]
    """Bytes by file name."""


def describe(folder: Path) -> ModelDescription:
    """Read configuration, tokenizer and weight headers; raises `UnsupportedModel` or `BrokenModelFolder`."""
    spec = ModelSpec.from_folder(folder)
    tensors = read_stored_tensors(folder).values()
    windows = [window for window in spec.sliding_windows if window is not None]
    return ModelDescription(
        folder=str(folder),
        architecture=spec.architecture,
        parameters=spec.parameters,
        layers=spec.layers,
        hidden_size=spec.hidden_size,
        query_heads=spec.query_heads,
        kv_heads=spec.kv_heads,
        head_size=spec.head_size,
        vocabulary_size=spec.vocabulary_size,
        tied_embeddings=spec.tied_embeddings,
        context_length=spec.max_sequence_length,
        sliding_window=min(windows, default=None),
        rope=f"{spec.rope.kind.value}, theta {spec.rope.theta:g}",
        stored_dtype=spec.stored_dtype,
        weight_bytes=sum(tensor.end - tensor.start for tensor in tensors),
        kv_bytes_per_token_float32=spec.kv_bytes_per_token(4),
        kv_bytes_per_token_bfloat16=spec.kv_bytes_per_token(2),
        tokenizer=_tokenizer_kind(folder / "tokenizer.json"),
        has_chat_template=_has_chat_template(folder),
        licence=_licence(folder),
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
    )


def _tokenizer_kind(path: Path) -> str:
    """Algorithm and size, such as `BPE, ByteLevel, 49152 tokens`."""
    content = ConfigReader.open(path).values
    model, decoder = content.get("model"), content.get("decoder")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise BrokenModelFolder(f"{path} has no vocabulary: download it again")
    kinds = [str(model.get("type", "unknown"))]
    if isinstance(decoder, dict):
        kinds.append(str(decoder.get("type")))
    return ", ".join([*kinds, f"{len(model['vocab'])} tokens"])


def _has_chat_template(folder: Path) -> bool:
    config_path = folder / "tokenizer_config.json"
    in_config = (
        config_path.is_file() and ConfigReader.open(config_path).values.get("chat_template") is not None
    )
    return in_config or (folder / "chat_template.jinja").is_file()


def _licence(folder: Path) -> str | None:
    """From the record of a fetch, else from the head of a model card (`license: ...`)."""
    if licence := read_licence(folder):
        return licence
    card = folder / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()[:60]
    found = [line.removeprefix("license:").strip() for line in lines if line.startswith("license:")]
    return next(iter(found), None)
