"""What transformers makes of SmolLM2: its tokens in float32, its log-probabilities in float64, everywhere.

References are kept in the user's cache under a hash of the model's files and the prompt; `refresh` (of the
command `python -m tests.oracle.full --refresh`) computes them anew.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from anabranch.cli.models.store import cache_folder
from tests.models import NEAR_TIE, load_reference
from tests.oracle.matrix import Expected
from tests.smollm2 import smollm2_folder
from workers.gateway.tokenizer import Tokenizer

GENERATED_TOKENS = 64
DRAWN_TOKENS = 64
"""Token ids whose log-probabilities are compared at every position, beside the best one's."""

_ROWS_AT_ONCE = 256
_SURVEY = Path(__file__).parents[2] / "anabranch/cli/data/river_survey.txt"
_TEXT_LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 89, 144, 233, 377, 610, 3000)
_TEXT_STEP = 97
_CHATS = (
    [{"role": "user", "content": "What is an anabranch?"}],
    [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "Name three rivers of Australia."},
        {"role": "assistant", "content": "The Murray, the Darling and the Lachlan."},
        {"role": "user", "content": "Which of them has an anabranch, and why does it matter?"},
    ],
    [{"role": "user", "content": "Write a Python function that merges two sorted lists."}],
)


@dataclass(frozen=True)
class Scores:
    """A model's opinion after each of `rows` tokens: [rows] each, `drawn_logprobs` [rows, DRAWN_TOKENS]."""

    best: Tensor
    gaps: Tensor
    best_logprobs: Tensor
    drawn_logprobs: Tensor

    @classmethod
    def of(cls, hidden: Tensor, logits_of: Callable[[Tensor], Tensor], best: Tensor | None = None) -> Scores:
        """Score final hidden states [rows, hidden size], some rows at a time: all logits are too many.

        `best_logprobs` are those of `best` [rows] where it is given: another model's choices.
        """
        parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for start in range(0, len(hidden), _ROWS_AT_ONCE):
            logits = logits_of(hidden[start : start + _ROWS_AT_ONCE])
            leaders = logits.topk(2, dim=-1)
            asked = leaders.indices[:, 0] if best is None else best[start : start + len(logits)]
            logprobs = logits.log_softmax(-1)
            parts.append(
                (
                    leaders.indices[:, 0].clone(),
                    leaders.values[:, 0] - leaders.values[:, 1],
                    logprobs.gather(1, asked[:, None])[:, 0],
                    logprobs[:, drawn_token_ids(logits.shape[1])],
                )
            )
        columns = zip(*parts, strict=True)
        return cls(*(torch.cat(list(column)) for column in columns))

    def differences(self, other: Scores) -> Tensor:
        """[rows] float64: the largest difference of log-probabilities from another model's, row by row."""
        best = (self.best_logprobs.double() - other.best_logprobs.double()).abs()
        drawn = (self.drawn_logprobs.double() - other.drawn_logprobs.double()).abs()
        return torch.maximum(best, drawn.amax(1))


@dataclass(frozen=True)
class Reference:
    """A prompt and what transformers says: one row of scores per token of `inputs`.

    `scores` are those of float32, which decides the tokens; `exact` those of float64 on the same inputs, its
    `best_logprobs` of float32's best tokens.
    """

    prompt: list[int]
    scores: Scores
    exact: Scores

    @property
    def inputs(self) -> list[int]:
        """The prompt and all generated tokens but the last: what a teacher gives."""
        return self.prompt + list(self.expected().tokens[:-1])

    def expected(self) -> Expected:
        """The free-running part: the generated tokens."""
        first = len(self.prompt) - 1
        scores = self.scores
        columns = (scores.best, scores.gaps, self.exact.best_logprobs, scores.best_logprobs)
        return Expected(*(column[first:].tolist() for column in columns))

    def near_ties(self) -> int:
        """Positions that float32 does not decide."""
        return int((self.scores.gaps < NEAR_TIE).sum())

    def largest_difference(self) -> float:
        """How far float32 is from float64 at most: what a comparison with float32 could not tell apart."""
        return float(self.scores.differences(self.exact).max())

    def save(self, path: Path) -> None:
        """Write the scores; the file appears complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        tensors = {
            f"{name}.{column}": tensor.contiguous()
            for name, scores in (("scores", self.scores), ("exact", self.exact))
            for column, tensor in vars(scores).items()
        }
        safetensors.torch.save_file(tensors, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, prompt: list[int]) -> Reference:
        """Read what `save` wrote."""
        tensors = safetensors.torch.load_file(path)
        columns = [field.name for field in fields(Scores)]
        scores, exact = (
            Scores(*(tensors[f"{name}.{column}"] for column in columns)) for name in ("scores", "exact")
        )
        return cls(prompt, scores, exact)


@cache
def drawn_token_ids(vocabulary_size: int) -> Tensor:
    """int64 [DRAWN_TOKENS]: the same for every run."""
    return torch.randperm(vocabulary_size, generator=torch.Generator().manual_seed(9))[:DRAWN_TOKENS]


@cache
def prompts() -> list[list[int]]:
    """Pieces of a long text, each from another place of it, and chats: 1 to 3,000 tokens."""
    tokenizer = Tokenizer(smollm2_folder())
    text = tokenizer.encode(_SURVEY.read_text(encoding="utf-8"))
    starts = [min(index * _TEXT_STEP, len(text) - length) for index, length in enumerate(_TEXT_LENGTHS)]
    pieces = [text[start : start + length] for start, length in zip(starts, _TEXT_LENGTHS, strict=True)]
    return pieces + [tokenizer.encode_chat(messages) for messages in _CHATS]


def reference(prompt: Sequence[int], refresh: bool = False) -> Reference:
    """The reference of one prompt, from the cache where it is there and `refresh` is not asked for."""
    settings = f"{list(prompt)} {GENERATED_TOKENS} {DRAWN_TOKENS} and float64".encode()
    key = hashlib.sha256(bytes.fromhex(model_hash()) + settings).hexdigest()
    path = cache_folder() / "oracle" / f"{key}.safetensors"
    if refresh or not path.exists():
        _compute(list(prompt)).save(path)
    return Reference.load(path, list(prompt))


@cache
def model_hash() -> str:
    """SHA-256 over the files that decide what the model says."""
    digest = hashlib.sha256()
    folder = smollm2_folder()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@cache
def _transformers_model(dtype: torch.dtype) -> Any:
    return load_reference(smollm2_folder(), dtype)


def _compute(prompt: list[int]) -> Reference:
    """Decode greedily with a cache, keeping the final hidden state of every position; then in float64."""
    model, exact_model = _transformers_model(torch.float32), _transformers_model(torch.float64)
    with torch.inference_mode():
        hidden = torch.cat(list(_hidden_states(model, prompt)))
        scores = Scores.of(hidden, model.lm_head)
        text = torch.tensor([Reference(prompt, scores, scores).inputs])
        exact_hidden = exact_model.model(text, use_cache=False).last_hidden_state[0]
        return Reference(prompt, scores, Scores.of(exact_hidden, exact_model.lm_head, scores.best))


def _hidden_states(model: Any, prompt: Sequence[int]) -> Iterator[Tensor]:
    """[rows, hidden size] of the prompt, then of each generated token but the last."""
    inputs, past = torch.tensor([list(prompt)]), None
    for index in range(GENERATED_TOKENS):
        answer = model.model(inputs, cache=past, use_cache=True)
        hidden, past = answer.last_hidden_state[0], answer.cache
        yield hidden
        if index < GENERATED_TOKENS - 1:
            inputs = model.lm_head(hidden[-1:]).argmax(-1)[None]
