"""The decoder against Hugging Face transformers, in float32: every architecture, every rope."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.memory_attention import MemoryAttention, run_step
from tests.models import ROPES, near_tie_share, random_prompt, reference_logits, reference_tokens, tiny_model
from tests.oracle.matrix import LOGPROB_TOLERANCE
from workers.dense.model import Decoder

NEAR_TIES_MAX = 0.02
"""A suite with more positions that float32 cannot decide would prove nothing."""


@dataclass(frozen=True)
class Case:
    """One model of the matrix."""

    architecture: str
    rope: str | Mapping[str, object] = "default"
    tied: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    "llama": Case("llama"),
    "llama-tied-mha": Case("llama", tied=True, overrides={"num_key_value_heads": 4}),
    "llama-mqa-biased": Case(
        "llama", overrides={"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}
    ),
    "llama-wide-heads": Case("llama", overrides={"head_dim": 32}),
    "llama-linear": Case("llama", "linear"),
    "llama-llama3": Case("llama", "llama3"),
    "llama-yarn": Case("llama", "yarn"),
    "llama-yarn-mscale": Case("llama", {**ROPES["yarn"], "mscale": 1.0, "mscale_all_dim": 0.7}),
    "llama-yarn-scaled": Case(
        "llama",
        {**ROPES["yarn"], "attention_factor": 1.3, "beta_fast": 24.0, "beta_slow": 2.0, "truncate": False},
    ),
    "llama-dynamic": Case("llama", "dynamic"),
    "mistral-window": Case("mistral", overrides={"sliding_window": 16}),
    "mistral-full": Case("mistral", tied=True, overrides={"sliding_window": None}),
    "qwen2": Case("qwen2", tied=True),
    "qwen2-window": Case(
        "qwen2",
        overrides={
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 2,
        },
    ),
    "qwen3": Case("qwen3", tied=True),
    "qwen3-window-yarn": Case(
        "qwen3",
        "yarn",
        overrides={
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention"],
            "attention_bias": True,
        },
    ),
    "smollm3": Case("smollm3", tied=True, overrides={"num_hidden_layers": 4}),
    "smollm3-window": Case(
        "smollm3",
        overrides={
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 16,
        },
    ),
}

TEXT_TOKENS = 112
GENERATED_TOKENS = 64


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds each model of the matrix once per session."""
    built: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in built:
            case = CASES[name]
            folder = tmp_path_factory.mktemp(name)
            built[name] = tiny_model(folder, case.architecture, case.rope, tied=case.tied, **case.overrides)
        return built[name]

    return build


def chunked_logits(decoder: Decoder, token_ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
    """[tokens, vocabulary]: logits after each token, fed in chunks of these sizes, repeated."""
    attention, start = MemoryAttention(decoder.spec), 0
    outputs: list[Tensor] = []
    while start < len(token_ids):
        size = chunks[len(outputs) % len(chunks)]
        rows = [(0, start + i, token_id) for i, token_id in enumerate(token_ids[start : start + size])]
        outputs.append(decoder.logits(run_step(decoder, attention, rows)))
        start += size
    return torch.cat(outputs)


@pytest.mark.parametrize("name", CASES)
def test_teacher_forced_log_probabilities_equal_transformers(
    name: str, model_folder: Callable[[str], Path]
) -> None:
    """At every position of a given text, fed in uneven chunks, all log-probabilities agree with float64's."""
    folder = model_folder(name)
    token_ids = random_prompt(TEXT_TOKENS, seed=1)
    expected = reference_logits(folder, token_ids, torch.float64)
    logits = chunked_logits(Decoder.from_folder(folder), token_ids, chunks=(1, 7, 40, 3))
    assert near_tie_share(expected) <= NEAR_TIES_MAX
    difference = (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max()
    assert float(difference) < LOGPROB_TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_transformers(name: str, model_folder: Callable[[str], Path]) -> None:
    """Two sequences decoded in one batch give transformers' tokens, up to the first near-tie."""
    folder = model_folder(name)
    prompts = [random_prompt(33, seed=2), random_prompt(5, seed=3)]
    references = reference_tokens(folder, prompts, GENERATED_TOKENS)
    generated = greedy(Decoder.from_folder(folder), prompts, GENERATED_TOKENS)
    for reference, tokens in zip(references, generated, strict=True):
        sharp = reference.sharp_length()
        assert tokens[:sharp] == list(reference.tokens[:sharp])
    assert sum(reference.sharp_length() for reference in references) >= GENERATED_TOKENS


def greedy(decoder: Decoder, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Greedy continuations: all prompts as chunks of one step, then one row per sequence and step."""
    attention = MemoryAttention(decoder.spec)
    rows = [(s, p, token) for s, prompt in enumerate(prompts) for p, token in enumerate(prompt)]
    ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1
    generated: list[list[int]] = [[] for _ in prompts]
    hidden = run_step(decoder, attention, rows)[ends]
    for index in range(count):
        best = decoder.logits(hidden).argmax(-1).tolist()
        for tokens, token in zip(generated, best, strict=True):
            tokens.append(token)
        rows = [(s, len(prompt) + index, best[s]) for s, prompt in enumerate(prompts)]
        hidden = run_step(decoder, attention, rows)
    return generated
