"""The sampler against transformers' logits processors: which tokens stay, and which one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.sampling import SamplingParameters
from workers.dense.noise import gumbels, stream_key, vocabulary_ids
from workers.dense.sampler import Sampled, Sampler, SampleRow, TokenHistory
from workers.dense.truncation import truncate, truncates

VOCABULARY = 200
NEAR_TIE = 1e-3
"""Closer choices are left to rounding: transformers sums in float32, the sampler in float64."""

PARAMETERS = st.builds(
    SamplingParameters,
    temperature=st.sampled_from([0.2, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 5, 50, VOCABULARY]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.7]),
)


def reference_scores(logits: Tensor, parameters: SamplingParameters, seen: Sequence[int]) -> Tensor:
    """[vocabulary]: `logits` through transformers' processors in the order of its `generate`."""
    processors: list[Any] = []
    if parameters.repetition_penalty != 1.0:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(parameters.repetition_penalty))
    processors.append(transformers.TemperatureLogitsWarper(parameters.temperature))
    if parameters.top_k:
        processors.append(transformers.TopKLogitsWarper(parameters.top_k))
    if parameters.top_p < 1.0:
        processors.append(transformers.TopPLogitsWarper(parameters.top_p))
    if parameters.min_p:
        processors.append(transformers.MinPLogitsWarper(parameters.min_p))
    scores = logits.unsqueeze(0).clone()
    for processor in processors:
        scores = processor(torch.tensor([list(seen)]), scores)
    return scores[0]


def draw_logits(seed: int, spread: float) -> Tensor:
    """[vocabulary] float32."""
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


@settings(max_examples=200, deadline=None)
@given(parameters=PARAMETERS, seed=st.integers(0, 10_000), spread=st.sampled_from([0.3, 2.0, 6.0]))
def test_the_drawn_token_is_the_best_of_what_transformers_keeps(
    parameters: SamplingParameters, seed: int, spread: float
) -> None:
    """Processed by transformers and perturbed by the same noise, the best score is the sampled token."""
    logits, seen = draw_logits(seed, spread), [seed % VOCABULARY, 3, 4, 3]
    sample = SampleRow(
        parameters, seed=seed, choice=1, output_index=2, history=TokenHistory(seen[:2], seen[2:])
    )
    (result,) = Sampler(VOCABULARY, ()).sample(logits.unsqueeze(0), [sample])
    assert isinstance(result, Sampled)
    noise = torch.from_numpy(gumbels(stream_key(seed, 1, 2), vocabulary_ids(VOCABULARY)))
    expected = int((reference_scores(logits, parameters, seen).double() + noise).argmax())
    assert result.token_id == expected or result.gap < NEAR_TIE


@settings(max_examples=200, deadline=None)
@given(parameters=PARAMETERS, seed=st.integers(0, 10_000), spread=st.sampled_from([0.3, 2.0, 6.0]))
def test_the_tokens_that_stay_are_those_transformers_keeps(
    parameters: SamplingParameters, seed: int, spread: float
) -> None:
    """Token by token, but for those that a boundary passes within a near-tie."""
    assume(truncates(parameters, VOCABULARY))
    logits = draw_logits(seed, spread)
    left = truncate((logits / parameters.temperature).double().numpy(), parameters)
    stays = set(left.token_ids[left.kept].tolist())
    unsure = set(left.token_ids[left.distances < NEAR_TIE].tolist())
    plain = SamplingParameters(
        temperature=parameters.temperature,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        min_p=parameters.min_p,
    )
    expected = set(torch.nonzero(reference_scores(logits, plain, [0]).isfinite()).flatten().tolist())
    assert stays ^ expected <= unsure


@pytest.mark.parametrize("penalty", [0.5, 1.3, 3.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    """Greedy choice under a penalty over prompt and output, each token counted once."""
    for seed in range(50):
        logits = draw_logits(seed, 1.0)
        seen = logits.topk(5).indices.tolist() * 2
        scores = reference_scores(logits, SamplingParameters(repetition_penalty=penalty), seen)
        parameters = SamplingParameters(temperature=0.0, repetition_penalty=penalty)
        sample = SampleRow(parameters, 0, 0, 3, TokenHistory(seen[:4], seen[4:]))
        (result,) = Sampler(VOCABULARY, ()).sample(logits.unsqueeze(0), [sample])
        assert isinstance(result, Sampled)
        assert result.token_id == int(scores.argmax())
