"""Builder of tiny random models in Hugging Face form, and what transformers says they generate.

Knows nothing of pytest. Models are 2 to 4 layers of hidden size 64 with seeded weights, scaled so that
the two best logits are seldom within `NEAR_TIE` of each other: the comparisons of tokens stay sharp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.tokenizer import BOS_ID, EOS_ID, VOCABULARY_SIZE, write_tokenizer

NEAR_TIE = 1e-3
"""Gap between the best two logits under which float32 does not promise which one wins."""

FAMILIES: Mapping[str, tuple[str, str]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM"),
}
"""Architecture -> names of transformers' configuration and model classes."""

ROPES: Mapping[str, Mapping[str, object]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
}
"""Scalings of rope under test; lengths are those of `tiny_model`'s default context of 512."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What transformers generates greedily after one prompt."""

    tokens: tuple[int, ...]
    gaps: tuple[float, ...]
    """Per token: its logit minus the second best."""

    def sharp_length(self) -> int:
        """How many tokens come before the first near-tie: a free-running comparison stops there."""
        return next((i for i, gap in enumerate(self.gaps) if gap < NEAR_TIE), len(self.gaps))


def tiny_model(
    folder: Path,
    architecture: str = "llama",
    rope: str | Mapping[str, object] = "default",
    *,
    tied: bool = False,
    seed: int = 0,
    tokenizer: bool = False,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write a model of `architecture` into `folder` and return the folder.

    `rope` is a key of `ROPES` or rope parameters as config.json spells them; `overrides` go to the
    configuration class; `shard_size` splits the weights into several files.
    """
    config_name, model_name = FAMILIES[architecture]
    options: dict[str, object] = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": dict(ROPES[rope] if isinstance(rope, str) else rope),
        "tie_word_embeddings": tied,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": None,
    }
    if architecture == "qwen3":
        options["head_dim"] = 32
    config: Any = getattr(transformers, config_name)(**(options | overrides))
    model: Any = getattr(transformers, model_name)(config)
    _fill(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def load_reference(
    folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", attention: str = "eager"
) -> Any:
    """The folder's model as transformers runs it on `device`, with the plainest attention it has, no TF32.

    In float64 really all of it is: transformers' plain softmax and its norms compute in float32 whatever the
    type, so attention is torch's there, and the norms are torch's of the same formula. (The angles of rope
    stay float32: they are part of what the model is.)
    """
    torch.set_float32_matmul_precision("highest")
    is_exact = dtype is torch.float64
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa" if is_exact else attention
    )
    if is_exact:
        _norm_exactly(model)
    return model.eval().to(device)


def reference_tokens(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    count: int,
    device: str = "cpu",
    attention: str = "eager",
) -> list[Reference]:
    """Greedy continuation of each prompt by `count` tokens, end tokens not minded."""
    model = load_reference(folder, device=device, attention=attention)
    return [_generate(model, prompt, count) for prompt in prompts]


def reference_logits(folder: Path, token_ids: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """[tokens, vocabulary]: the logits after each of `token_ids`, all given; float64 or else float32."""
    with torch.inference_mode():
        logits: Tensor = load_reference(folder, dtype)(torch.tensor([list(token_ids)])).logits[0]
    return logits if dtype is torch.float64 else logits.to(torch.float32)


def random_prompt(length: int, seed: int, vocabulary_size: int = VOCABULARY_SIZE) -> list[int]:
    """`length` token ids drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary_size, (length,), generator=generator).tolist()


def near_tie_share(logits: Tensor) -> float:
    """The share of rows of [rows, vocabulary] whose best two logits are a near-tie."""
    best = logits.topk(2, dim=-1).values
    return float((best[:, 0] - best[:, 1] < NEAR_TIE).float().mean())


def _norm_exactly(model: Any) -> None:
    """Replace each RMS norm by torch's, which computes in the type of its input."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)


def _generate(model: Any, prompt: Sequence[int], count: int) -> Reference:
    """Greedy decoding with a cache, one token at a time."""
    tokens: list[int] = []
    gaps: list[float] = []
    inputs, cache = torch.tensor([list(prompt)], device=model.device), None
    with torch.inference_mode():
        for _ in range(count):
            answer = model(inputs, cache=cache, use_cache=True)
            best = answer.logits[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            inputs, cache = torch.tensor([[tokens[-1]]], device=model.device), answer.cache
    return Reference(tuple(tokens), tuple(gaps))


def _fill(model: Any, seed: int) -> None:
    """Seeded weights of unit gain, biases and norms away from their trivial values, a loud head."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in embeddings:
                parameter.copy_(noise * 0.6)  # logits spread by 0.6 sqrt(hidden size), about 5
            elif parameter.ndim == 2:
                parameter.copy_(noise * 1.3 / parameter.shape[1] ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.3)
            else:
                parameter.copy_(1.0 + noise * 0.2)
