"""From logits to token ids: penalties, truncation and Gumbel-max with counter noise.

A row's token depends on its own logits, parameters, history and place in its sequence; on nothing
else of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import Internal
from cluster.sampling import SamplingParameters
from workers.dense.noise import gumbels, stream_key, vocabulary_ids
from workers.dense.operators import RowOperators, TorchOperators
from workers.dense.truncation import truncate, truncates


class TokenHistory:
    """Which tokens a sequence has seen: what penalties look at, kept up as tokens come."""

    def __init__(self, prompt: Iterable[int], output: Iterable[int] = ()) -> None:
        self._prompt = np.fromiter(set(prompt), dtype=np.int64)
        self._counts: dict[int, int] = {}
        for token_id in output:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """One more output token."""
        self._counts[token_id] = self._counts.get(token_id, 0) + 1

    def seen(self) -> NDArray[np.int64]:
        """Token ids of prompt and output, each once."""
        return np.union1d(self._prompt, self.output_counts()[0])

    def output_counts(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Token ids of the output, each once, and how often each occurred."""
        ids = np.fromiter(self._counts.keys(), dtype=np.int64, count=len(self._counts))
        return ids, np.fromiter(self._counts.values(), dtype=np.float64, count=len(self._counts))


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One token to choose."""

    parameters: SamplingParameters
    seed: int
    """Resolved: drawn by the gateway where the request gave none."""
    choice: int
    output_index: int
    """0 for the first output token."""
    history: TokenHistory | None = None
    """Needed by rows with penalties only."""

    @property
    def plain(self) -> bool:
        """Whether the best raw logit wins: the fast path."""
        parameters = self.parameters
        adjusted = parameters.penalized or parameters.logit_bias or parameters.forced_open(self.output_index)
        return parameters.greedy and not adjusted


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token."""

    token_id: int
    gap: float
    """How far (in logits, noise included) the choice was from being another; exact under 5e-3.

    Less than 1e-3 is a near-tie: another order of float32 sums may choose otherwise.
    """
    logprob: float | None = None
    """Natural log-probability under the raw logits, where `logprobs` asks for it."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The best tokens under the raw logits with their log-probabilities, best first."""


class Sampler:
    """Chooses the tokens of a batch; holds no state of any sequence."""

    def __init__(
        self, vocabulary_size: int, eos_token_ids: tuple[int, ...], operators: RowOperators | None = None
    ) -> None:
        """`operators`: those over float32 on the logits' device; PyTorch's, which serve any, where None."""
        self._vocabulary_size = vocabulary_size
        self._eos_token_ids = eos_token_ids
        self._operators = operators or TorchOperators()

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled | Internal]:
        """One token per row of `logits` [n, vocabulary_size >= 2] float32, on any device.

        A row whose logits are not finite, or all masked, gets an error instead of a token: its sequence
        fails, the others of the batch go on.
        """
        assert logits.shape == (len(rows), self._vocabulary_size), (
            f"{tuple(logits.shape)} for {len(rows)} rows"
        )
        choices = self._choose_plain(logits, rows) | self._choose_adjusted(logits, rows)
        reports = _report(logits, rows, choices)
        return [self._result(index, choices[index], reports) for index in range(len(rows))]

    def _result(
        self, index: int, choice: tuple[int, float], reports: dict[int, Sampled]
    ) -> Sampled | Internal:
        token_id, gap = choice
        if math.isnan(gap):
            return Internal("no token can be chosen: the model's logits are not finite, or all are masked")
        return reports.get(index) or Sampled(token_id, gap)

    def _choose_plain(self, logits: Tensor, rows: Sequence[SampleRow]) -> dict[int, tuple[int, float]]:
        """Row index -> (token id, gap) of the rows where the best raw logit wins, in one pass each."""
        indices = [index for index, row in enumerate(rows) if row.plain]
        if not indices:
            return {}
        chosen = logits if len(indices) == len(rows) else logits[indices]
        found = (numbers.tolist() for numbers in self._operators.best_two(chosen))
        return {
            index: (token_id, best - second if math.isfinite(best) else math.nan)
            for index, token_id, best, second in zip(indices, *found, strict=True)
        }

    def _choose_adjusted(self, logits: Tensor, rows: Sequence[SampleRow]) -> dict[int, tuple[int, float]]:
        """Row index -> (token id, gap) of all other rows, one by one on the CPU."""
        indices = [index for index, row in enumerate(rows) if not row.plain]
        if not indices:
            return {}
        chosen = logits[indices].to("cpu").numpy()
        return {
            index: self._choose(scores.astype(np.float64), rows[index])  # a copy of its own to adjust
            for index, scores in zip(indices, chosen, strict=True)
        }

    def _choose(self, scores: NDArray[np.float64], row: SampleRow) -> tuple[int, float]:
        """(token id, gap) from one row of raw logits; the gap is NaN where no token can be chosen."""
        if np.isfinite(scores.max()):
            self._adjust(scores, row)
        if not np.isfinite(scores.max()):  # poisoned by the model, or all masked
            return 0, float("nan")
        parameters = row.parameters
        if parameters.greedy:
            return _best(scores)
        tempered = scores / parameters.temperature
        key = stream_key(row.seed, row.choice, row.output_index)
        if not truncates(parameters, self._vocabulary_size):
            return _best(tempered + gumbels(key, vocabulary_ids(self._vocabulary_size)))
        left = truncate(tempered, parameters)
        perturbed = left.scores + gumbels(key, left.token_ids)
        winner = int(np.argmax(np.where(left.kept, perturbed, -np.inf)))
        # Another token wins if it catches up with the winner and, once dropped, comes back in; the
        # winner loses if it is dropped itself.
        needed = np.maximum(perturbed[winner] - perturbed, np.where(left.kept, 0.0, left.distances))
        needed[winner] = left.distances[winner]
        return int(left.token_ids[winner]), float(needed.min())

    def _adjust(self, scores: NDArray[np.float64], row: SampleRow) -> None:
        """Penalties, bias, and the masks of `min_tokens`, in place."""
        parameters = row.parameters
        if parameters.penalized:
            assert row.history is not None, "penalties look at the sequence's history"
            _penalize(scores, parameters, row.history)
        for token_id, bias in parameters.logit_bias.items():
            scores[token_id] += bias
        if parameters.forced_open(row.output_index):
            scores[[*self._eos_token_ids, *parameters.stop_token_ids]] = -np.inf


def _penalize(scores: NDArray[np.float64], parameters: SamplingParameters, history: TokenHistory) -> None:
    """Repetition over prompt and output (arXiv 1909.05858), then frequency and presence over output."""
    if parameters.repetition_penalty != 1.0:
        seen = history.seen()
        penalty = parameters.repetition_penalty
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    token_ids, counts = history.output_counts()
    scores[token_ids] -= parameters.frequency_penalty * counts + parameters.presence_penalty


def _best(scores: NDArray[np.float64]) -> tuple[int, float]:
    """The best token and its lead on the second; ties go to the lower id."""
    winner = int(np.argmax(scores))
    best = float(scores[winner])
    scores[winner] = -np.inf
    return winner, best - float(scores.max())


def _report(
    logits: Tensor, rows: Sequence[SampleRow], choices: dict[int, tuple[int, float]]
) -> dict[int, Sampled]:
    """The rows that asked for log-probabilities, under the raw logits whatever was adjusted."""
    reports: dict[int, Sampled] = {}
    for index, row in enumerate(rows):
        if row.parameters.logprobs is None:
            continue
        token_id, gap = choices[index]
        logprobs = logits[index].log_softmax(-1)
        best = logprobs.topk(row.parameters.logprobs)
        alternatives = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        reports[index] = Sampled(token_id, gap, float(logprobs[token_id]), alternatives)
    return reports
