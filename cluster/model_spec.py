"""What a model is, read from a Hugging Face folder without loading a weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.config_reader import ConfigReader
from cluster.errors import UnsupportedModel
from cluster.rope_spec import RopeKind, RopeSpec, read_rope
from cluster.types import KvGeometry
from cluster.weight_files import find_weight_files, fingerprint, read_stored_tensors


@dataclass(frozen=True, slots=True)
class Biases:
    """Which projections add a bias."""

    query_key_value: bool = False
    output: bool = False
    mlp: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of one decoder-only model; immutable, shared by all roles."""

    architecture: str
    layers: int
    hidden_size: int
    query_heads: int
    kv_heads: int
    head_size: int
    intermediate_size: int
    vocabulary_size: int
    rms_epsilon: float
    tied_embeddings: bool
    biases: Biases
    query_key_norm: bool
    """Whether queries and keys are RMS-normed per head before rotation (Qwen3)."""
    sliding_windows: tuple[int | None, ...]
    """Per layer: the row at p sees p-w+1..p; None sees all."""
    uses_rope: tuple[bool, ...]
    """Per layer: False where positions are not encoded (SmolLM3's NoPE layers)."""
    rope: RopeSpec
    context_length: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    stored_dtype: str
    """The dtype config.json recommends: float32, bfloat16 or float16."""
    weights_fingerprint: str = ""
    """See `weight_files.fingerprint`; empty where the folder holds no weights."""

    @classmethod
    def from_folder(cls, folder: Path | str) -> ModelSpec:
        """Read config.json, generation_config.json and, if weights are there, their fingerprint.

        Raises `UnsupportedModel` or `BrokenModelFolder`.
        """
        folder = Path(folder)
        config = ConfigReader.open(folder / "config.json")
        spec = read_spec(config, _read_generation_config(folder), _read_fingerprint(folder))
        _check_shape(config, spec)
        return spec

    @property
    def max_sequence_length(self) -> int:
        """Most tokens of prompt and output together.

        With dynamic NTK scaling the frequencies change past the original length, for tokens already
        cached too: no cache that computes in place can follow, so the limit is that length.
        """
        return self.rope.original_length if self.rope.kind is RopeKind.DYNAMIC else self.context_length

    @property
    def window_tokens(self) -> int | None:
        """How many tokens a row sees at most in any layer, itself included; None: all."""
        return widest_window(self.sliding_windows)

    @property
    def digest(self) -> str:
        """SHA-256 in hexadecimal of all that determines KV: the "model and RoPE digest".

        Equal digests mean KV of equal meaning; what only the sampler reads (end tokens) is left out.
        """
        facts = asdict(self)
        for name in ("eos_token_ids", "bos_token_id", "context_length", "stored_dtype"):
            del facts[name]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def geometry(self, dtype: str, block_tokens: int) -> KvGeometry:
        """The cache of this model in `dtype`, in blocks of `block_tokens`."""
        return KvGeometry(
            layers=self.layers,
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            head_size=self.head_size,
            dtype=dtype,
            block_tokens=block_tokens,
            digest=self.digest,
        )

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Keys and values of one token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * element_bytes

    @property
    def parameters(self) -> int:
        """Number of weights; tied embeddings count once."""
        query_width, kv_width = self.query_heads * self.head_size, self.kv_heads * self.head_size
        attention = 2 * self.hidden_size * (query_width + kv_width)
        attention += (
            self.biases.query_key_value * (query_width + 2 * kv_width) + self.biases.output * self.hidden_size
        )
        attention += self.query_key_norm * 2 * self.head_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += self.biases.mlp * (2 * self.intermediate_size + self.hidden_size)
        embeddings = (1 if self.tied_embeddings else 2) * self.vocabulary_size * self.hidden_size
        return self.layers * (attention + mlp + 2 * self.hidden_size) + embeddings + self.hidden_size


def widest_window(windows: Sequence[int | None]) -> int | None:
    """The widest of the layers' windows; None where a layer sees everything."""
    sizes = [window for window in windows if window is not None]
    return max(sizes) if len(sizes) == len(windows) else None


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture reads its config.json: the defaults of absent keys and its own rules."""

    biases: Callable[[ConfigReader], Biases]
    sliding_windows: Callable[[ConfigReader, int], tuple[int | None, ...]]
    kv_heads: int | None
    """None: as many as query heads."""
    head_size: int | None = None
    """None: hidden size / query heads."""
    theta: float = 10_000.0
    tied_embeddings: bool = False
    query_key_norm: bool = False
    has_nope_layers: bool = False


def _no_biases(_config: ConfigReader) -> Biases:
    return Biases()


def _configured_biases(config: ConfigReader) -> Biases:
    attention = config.boolean("attention_bias", False)
    return Biases(attention, attention, config.boolean("mlp_bias", False))


def _qwen2_biases(_config: ConfigReader) -> Biases:
    return Biases(query_key_value=True)


def _qwen3_biases(config: ConfigReader) -> Biases:
    attention = config.boolean("attention_bias", False)
    return Biases(attention, attention)


def _no_windows(_config: ConfigReader, layers: int) -> tuple[int | None, ...]:
    return (None,) * layers


def _mistral_windows(config: ConfigReader, layers: int) -> tuple[int | None, ...]:
    """One window for all layers; 4096 where the key is absent, none where it is null."""
    window = config.integer_or_none("sliding_window") if "sliding_window" in config.values else 4096
    return (window,) * layers


def _qwen_windows(config: ConfigReader, layers: int) -> tuple[int | None, ...]:
    """Windows on the layers named by `layer_types`, else on those from `max_window_layers` on."""
    window = config.integer("sliding_window", 4096) if config.boolean("use_sliding_window", False) else None
    first = config.integer("max_window_layers", 28, low=0)
    default = tuple("sliding_attention" if layer >= first else "full_attention" for layer in range(layers))
    return _windows_of(config, layers, default, window)


def _smollm3_windows(config: ConfigReader, layers: int) -> tuple[int | None, ...]:
    """Windows on the layers named by `layer_types`, else on the NoPE layers."""
    window = config.integer_or_none("sliding_window") if config.boolean("use_sliding_window", False) else None
    roped = _read_uses_rope(config, layers)
    default = tuple("full_attention" if rope else "sliding_attention" for rope in roped)
    return _windows_of(config, layers, default, window)


def _windows_of(
    config: ConfigReader, layers: int, default: tuple[str, ...], window: int | None
) -> tuple[int | None, ...]:
    """`window` on the sliding layers of `layer_types` (or of `default`)."""
    types = config.texts("layer_types") or default
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModel(f"{config.path}: layer_types {sorted(unknown)} are not supported")
    if len(types) < layers:
        raise config.broken("layer_types", f"must name {layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in types[:layers])


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_configured_biases, _no_windows, kv_heads=None),
    "MistralForCausalLM": Family(_no_biases, _mistral_windows, kv_heads=8),
    "Qwen2ForCausalLM": Family(_qwen2_biases, _qwen_windows, kv_heads=32),
    "Qwen3ForCausalLM": Family(_qwen3_biases, _qwen_windows, kv_heads=32, head_size=128, query_key_norm=True),
    "SmolLM3ForCausalLM": Family(
        _configured_biases,
        _smollm3_windows,
        kv_heads=4,
        theta=2e6,
        tied_embeddings=True,
        has_nope_layers=True,
    ),
}
"""The supported architectures. Defaults are those of transformers' configuration classes."""


def read_spec(config: ConfigReader, generation: ConfigReader, weights_fingerprint: str = "") -> ModelSpec:
    """The spec that a config.json and a generation_config.json (empty if absent) describe."""
    architecture, family = _read_family(config)
    layers = config.integer("num_hidden_layers")
    hidden_size, query_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    context_length = config.integer("max_position_embeddings")
    rope = read_rope(config, family.theta, context_length)
    return ModelSpec(
        architecture=architecture,
        layers=layers,
        hidden_size=hidden_size,
        query_heads=query_heads,
        kv_heads=_read_kv_heads(config, family, query_heads),
        head_size=config.integer("head_dim", family.head_size or hidden_size // query_heads),
        intermediate_size=config.integer("intermediate_size"),
        vocabulary_size=config.integer("vocab_size"),
        rms_epsilon=config.number("rms_norm_eps", 1e-6),
        tied_embeddings=config.boolean("tie_word_embeddings", family.tied_embeddings),
        biases=family.biases(config),
        query_key_norm=family.query_key_norm,
        sliding_windows=family.sliding_windows(config, layers),
        uses_rope=_read_uses_rope(config, layers) if family.has_nope_layers else (True,) * layers,
        rope=rope,
        context_length=_extended_length(rope, context_length),
        eos_token_ids=tuple(
            dict.fromkeys(config.integers("eos_token_id") + generation.integers("eos_token_id"))
        ),
        bos_token_id=next(iter(config.integers("bos_token_id")), None),
        stored_dtype=config.text("dtype", config.text("torch_dtype", "float32")),
        weights_fingerprint=weights_fingerprint,
    )


def _read_family(config: ConfigReader) -> tuple[str, Family]:
    """The architecture named by config.json; raises `UnsupportedModel` with the list of ours."""
    names = config.texts("architectures")
    known = [name for name in names if name in FAMILIES]
    if not known:
        raise UnsupportedModel(
            f"{config.path}: architectures {list(names)} not supported; supported are {', '.join(FAMILIES)}"
        )
    activation = config.text("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModel(f"{config.path}: hidden_act {activation!r} is not supported, only 'silu'")
    if config.values.get("quantization_config") is not None:
        raise UnsupportedModel(
            f"{config.path}: quantized weights are not supported; use the unquantized model"
        )
    return known[0], FAMILIES[known[0]]


def _read_kv_heads(config: ConfigReader, family: Family, query_heads: int) -> int:
    """A null counts as "as many as query heads", an absent key as the family's default."""
    if config.values.get("num_key_value_heads", family.kv_heads) is None:
        return query_heads
    return config.integer("num_key_value_heads", family.kv_heads)


def _read_uses_rope(config: ConfigReader, layers: int) -> tuple[bool, ...]:
    """SmolLM3's `no_rope_layers`, whose 1 means "uses rope", or every n-th layer without."""
    flags = config.integers("no_rope_layers")
    if not flags:
        interval = config.integer("no_rope_layer_interval", 4)
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if len(flags) < layers:
        raise config.broken("no_rope_layers", f"must name {layers} layers")
    return tuple(flag != 0 for flag in flags[:layers])


def _extended_length(rope: RopeSpec, context_length: int) -> int:
    """YaRN folders may keep the original max_position_embeddings; the factor then extends it."""
    if rope.kind is RopeKind.YARN:
        return max(context_length, int(rope.original_length * rope.factor))
    return context_length


def _check_shape(config: ConfigReader, spec: ModelSpec) -> None:
    """Numbers that must divide each other."""
    if spec.query_heads % spec.kv_heads:
        raise config.broken("num_key_value_heads", f"must divide num_attention_heads {spec.query_heads}")
    if spec.head_size % 2:
        raise UnsupportedModel(
            f"{config.path}: head size {spec.head_size} is odd; rotary embeddings need pairs"
        )
    if spec.stored_dtype not in ("float32", "bfloat16", "float16"):
        raise UnsupportedModel(f"{config.path}: dtype {spec.stored_dtype} is not supported")
    if any(token_id >= spec.vocabulary_size for token_id in spec.eos_token_ids):
        raise config.broken("eos_token_id", f"lies outside the vocabulary of {spec.vocabulary_size}")


def _read_generation_config(folder: Path) -> ConfigReader:
    """generation_config.json, or an empty object where the folder has none."""
    path = folder / "generation_config.json"
    return ConfigReader.open(path) if path.exists() else ConfigReader(path, {})


def _read_fingerprint(folder: Path) -> str:
    """The weights' fingerprint; empty for a folder with only tokenizer and configuration."""
    return fingerprint(read_stored_tensors(folder)) if find_weight_files(folder) else ""
