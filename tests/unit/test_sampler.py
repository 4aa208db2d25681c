"""The sampler: definitions against a slow restatement, noise against statistics, gaps against attack."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.errors import Internal, InvalidRequest
from cluster.sampling import SamplingParameters
from workers.dense.noise import gumbels, stream_key, uniforms, vocabulary_ids
from workers.dense.sampler import Sampled, Sampler, SampleRow, TokenHistory

VOCABULARY = 64
EOS = (3, 5)
GREEDY = SamplingParameters(temperature=0.0)


def row(parameters: SamplingParameters, index: int = 0, **changes: Any) -> SampleRow:
    """A row of seed 7 and choice 0 unless changed."""
    return replace(SampleRow(parameters, seed=7, choice=0, output_index=index), **changes)


def choose(logits: Tensor, *rows: SampleRow) -> list[Sampled]:
    """Sample and insist on tokens."""
    results = Sampler(logits.shape[-1], EOS).sample(logits, rows)
    return [result for result in results if isinstance(result, Sampled)]


def random_logits(rows: int, seed: int, spread: float = 3.0, vocabulary: int = VOCABULARY) -> Tensor:
    """[rows, vocabulary] float32."""
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def restated(logits: Tensor, sample: SampleRow) -> tuple[int, list[int]]:
    """(token, tokens that stay) by sorting everything and following the definitions one by one."""
    parameters = sample.parameters
    scores = logits.double().numpy() / parameters.temperature
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    if parameters.top_k:
        order = [i for i in order if scores[i] >= scores[order[parameters.top_k - 1]]]
    mass = np.exp(scores[order] - scores[order[0]])
    mass /= mass.sum()
    stays = [i for rank, i in enumerate(order) if rank == 0 or mass[:rank].sum() < parameters.top_p]
    stays = [i for i in stays if scores[i] >= scores[order[0]] + np.log(max(parameters.min_p, 1e-300))]
    noise = gumbels(stream_key(sample.seed, sample.choice, sample.output_index), vocabulary_ids(len(scores)))
    return max(stays, key=lambda i: scores[i] + noise[i]), sorted(stays)


def test_greedy_takes_the_best_and_reports_its_lead() -> None:
    """Temperature 0 is the argmax of each row, its gap the lead on the second."""
    logits = random_logits(5, seed=0)
    before = logits.clone()
    best = logits.topk(2)
    for result, ids, values in zip(
        choose(logits, *[row(GREEDY)] * 5), best.indices.tolist(), best.values, strict=True
    ):
        assert result.token_id == ids[0]
        assert result.gap == pytest.approx(float(values[0] - values[1]))
    assert torch.equal(logits, before), "the caller's logits stay as they were"


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 10, VOCABULARY - 1, VOCABULARY]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    spread=st.sampled_from([0.01, 1.0, 5.0]),
)
def test_truncation_follows_its_definition(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, spread: float
) -> None:
    """For any mix of filters the token is that of the slow restatement, unless a boundary is near."""
    parameters = SamplingParameters(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = random_logits(1, seed % 1000, spread)
    (result,) = choose(logits, row(parameters, seed=seed))
    if result.gap > 1e-6:
        assert result.token_id == restated(logits[0], row(parameters, seed=seed))[0]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.sampled_from([0, 3, 20]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05]),
    spread=st.sampled_from([0.003, 0.05, 2.0]),
)
def test_no_change_under_half_the_gap_changes_the_token(
    seed: int, top_k: int, top_p: float, min_p: float, spread: float
) -> None:
    """The gap is honest: logits moved by less than half of it (5e-3 at most) give the same token."""
    parameters = SamplingParameters(top_k=top_k, top_p=top_p, min_p=min_p)
    logits = random_logits(1, seed, spread).double()
    samples = row(parameters, seed=seed)
    (result,) = choose(logits.float(), samples)
    attack = min(result.gap, 5e-3) * 0.49
    for attempt in range(20):
        signs = torch.randint(0, 2, logits.shape, generator=torch.Generator().manual_seed(attempt)) * 2 - 1
        if attempt == 0:  # the worst case for the winner: it falls, all others rise
            signs = torch.ones_like(signs)
            signs[0, result.token_id] = -1
        moved = restated((logits.float().double() + attack * signs)[0], samples)[0]
        assert moved == result.token_id or attack < 1e-9


def test_noise_depends_on_nothing_but_its_four_arguments() -> None:
    """A row's token is the same alone, in a batch, in any place of it, and with other tokens cut off."""
    logits = random_logits(6, seed=4)
    parameters = SamplingParameters(temperature=1.0)
    rows = [row(parameters, index) for index in range(6)]
    together = [result.token_id for result in choose(logits, *rows)]
    alone = [choose(logits[i : i + 1], rows[i])[0].token_id for i in range(6)]
    backwards = [result.token_id for result in choose(logits.flip(0), *rows[::-1])][::-1]
    assert together == alone == backwards
    few = np.array([5, 60, 2])
    assert np.array_equal(uniforms(99, few), uniforms(99, vocabulary_ids(VOCABULARY))[few])


def test_each_argument_changes_the_noise() -> None:
    """Seed, choice and output index are told apart, also where they would sum to the same."""
    keys = {
        stream_key(seed, choice, index) for seed in range(20) for choice in range(20) for index in range(20)
    }
    assert len(keys) == 8000


def test_noise_is_splitmix64() -> None:
    """The published first outputs of SplitMix64 from state 0, and one token of a stream, pinned.

    Noise is part of what a sequence may rely on across versions: it must not change unnoticed.
    """
    published = np.array([0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F], dtype=np.uint64)
    expected = ((published >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    assert np.array_equal(uniforms(0, np.arange(3)), expected)
    assert stream_key(1, 2, 3) == 0xD0734750FDE362B3


def test_noise_is_uniform_and_uncorrelated() -> None:
    """Uniforms over tokens, and over steps for one token, fill 256 cells evenly and do not correlate."""
    tokens = uniforms(stream_key(1, 0, 0), vocabulary_ids(100_000))
    steps = np.array([uniforms(stream_key(1, 0, index), np.array([17]))[0] for index in range(20_000)])
    seeds = np.array([uniforms(stream_key(seed, 0, 0), np.array([17]))[0] for seed in range(20_000)])
    for sample in (tokens, steps, seeds):
        counts = np.bincount((sample * 256).astype(int), minlength=256)
        chi_squared = float(((counts - len(sample) / 256) ** 2 / (len(sample) / 256)).sum())
        assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255), "five sigma of chi squared, 255 degrees"
        for lag in (1, 2, 7):
            correlation = float(np.corrcoef(sample[:-lag], sample[lag:])[0, 1])
            assert abs(correlation) < 5 / math.sqrt(len(sample))
        assert 0.0 < sample.min() <= sample.max() < 1.0


def test_extreme_uniforms_make_finite_noise() -> None:
    """The ends of the grid, 2^-53 and 1 - 2^-53, stay inside (0, 1) in float64."""
    ends = (np.array([0, 2**52 - 1], dtype=np.uint64).astype(np.float64) + 0.5) * 2.0**-52
    assert ends[0] > 0.0
    assert ends[1] < 1.0
    assert np.isfinite(-np.log(-np.log(ends))).all()


def test_sampled_frequencies_are_the_softmax() -> None:
    """20,000 draws from one distribution match it cell by cell within five sigma."""
    logits = random_logits(1, seed=11, spread=1.0, vocabulary=8)
    draws = 20_000
    noise = np.stack([gumbels(stream_key(5, 0, index), vocabulary_ids(8)) for index in range(draws)])
    counts = np.bincount((logits.numpy() + noise).argmax(1), minlength=8)
    share = logits[0].softmax(-1).numpy()
    assert (np.abs(counts - draws * share) < 5 * np.sqrt(draws * share * (1 - share))).all()


def test_penalties_follow_their_definitions() -> None:
    """Repetition scales tokens of prompt and output; frequency and presence subtract over output."""
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5, 1.9, 0.0]])
    history = TokenHistory([0, 1], [2, 2])
    expected = logits[0].clone()
    expected[[0, 2]] /= 1.5
    expected[1] *= 1.5
    expected[2] -= 2 * 0.25 + 0.125
    parameters = replace(GREEDY, repetition_penalty=1.5, frequency_penalty=0.25, presence_penalty=0.125)
    (result,) = choose(logits, row(parameters, history=history))
    best = expected.topk(2)
    assert result.token_id == int(best.indices[0]) == 4
    assert result.gap == pytest.approx(float(best.values[0] - best.values[1]))


def test_history_kept_up_equals_history_rebuilt() -> None:
    """A sequence that was taken over sees the same penalties as one that was not."""
    kept = TokenHistory([4, 9, 4])
    for token_id in (1, 4, 1):
        kept.append(token_id)
    rebuilt = TokenHistory([4, 9, 4], [1, 4, 1])
    assert kept.seen().tolist() == rebuilt.seen().tolist() == [1, 4, 9]
    assert [a.tolist() for a in kept.output_counts()] == [a.tolist() for a in rebuilt.output_counts()]


def test_bias_moves_a_token_and_bans_one() -> None:
    """A bias of 100 wins, one of -100 loses."""
    logits = random_logits(1, seed=1)
    best = int(logits.argmax())
    assert choose(logits, row(replace(GREEDY, logit_bias={9: 100.0})))[0].token_id == 9
    assert choose(logits, row(replace(GREEDY, logit_bias={best: -100.0})))[0].token_id != best


def test_min_tokens_masks_end_and_stop_tokens_until_reached() -> None:
    """Below `min_tokens` neither end nor stop tokens are chosen; from there on they are."""
    parameters = replace(GREEDY, min_tokens=2, stop_token_ids=(8,))
    for banned in (*EOS, 8):
        logits = torch.zeros(1, VOCABULARY)
        logits[0, banned] = 9.0
        assert choose(logits, row(parameters, index=1))[0].token_id not in (*EOS, 8)
        assert choose(logits, row(parameters, index=2))[0].token_id == banned


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    """Temperature, penalties and bias do not touch what is reported; the chosen token is reported too."""
    logits = random_logits(2, seed=2)
    parameters = SamplingParameters(temperature=2.0, logprobs=3, logit_bias={1: 50.0})
    result, quiet = choose(logits, row(parameters), row(GREEDY))
    expected = logits[0].log_softmax(-1)
    assert result.token_id == 1
    assert result.logprob == pytest.approx(float(expected[1]))
    assert [token_id for token_id, _ in result.alternatives] == expected.topk(3).indices.tolist()
    assert [value for _, value in result.alternatives] == pytest.approx(expected.topk(3).values.tolist())
    assert (quiet.logprob, quiet.alternatives) == (None, ())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_not_finite_fail_their_row_only(poison: float) -> None:
    """A broken row gets an error, never a token; its neighbours get theirs."""
    logits = random_logits(4, seed=3)
    logits[1, 7] = logits[2, 7] = poison
    rows = [row(GREEDY), row(GREEDY), row(SamplingParameters(top_p=0.9)), row(SamplingParameters())]
    results = Sampler(VOCABULARY, EOS).sample(logits, rows)
    assert [type(result) for result in results] == [Sampled, Internal, Internal, Sampled]


@pytest.mark.parametrize("filters", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}])
def test_a_row_that_masks_leave_without_a_token_fails_alone(filters: dict[str, Any]) -> None:
    """The only token of finite logit is a stop token still forbidden: an error, and for this row only."""
    logits = random_logits(2, seed=3)
    logits[0] = -torch.inf
    logits[0, 8] = 1.0
    parameters = SamplingParameters(min_tokens=2, stop_token_ids=(8,), **filters)
    results = Sampler(VOCABULARY, EOS).sample(logits, [row(parameters), row(parameters)])
    assert [type(result) for result in results] == [Internal, Sampled]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": VOCABULARY + 1}, "top_k"),
        ({"min_p": -0.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop_token_ids": (VOCABULARY,)}, "stop_token_ids"),
        ({"stop_token_ids": (1,) * 65}, "stop_token_ids"),
        ({"logit_bias": {VOCABULARY: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
        ({"top_k": True}, "top_k"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(changes: dict[str, Any], names: str) -> None:
    """Every field has a range; outside it the error names field, value and range."""
    with pytest.raises(InvalidRequest, match=names) as refusal:
        SamplingParameters(**changes).validate(VOCABULARY)
    assert "must be" in refusal.value.message


def test_edges_of_the_ranges_are_accepted() -> None:
    """The bounds themselves are allowed."""
    SamplingParameters(
        temperature=2.0,
        top_k=VOCABULARY,
        min_p=1.0,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        seed=2**64 - 1,
        max_tokens=1,
        min_tokens=1,
        stop_token_ids=(VOCABULARY - 1,),
        logprobs=20,
    ).validate(VOCABULARY)


def test_ends_by_stop_tokens_even_when_end_tokens_are_ignored() -> None:
    """`ignore_eos` lifts the model's end tokens, not the request's own."""
    parameters = SamplingParameters(stop_token_ids=(8,), ignore_eos=True)
    assert parameters.ends(8, EOS)
    assert not parameters.ends(3, EOS)
    assert replace(parameters, ignore_eos=False).ends(3, EOS)
