"""The algebra of DistAttention, by property: whatever the split, the order or the size of the scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.partials import Partial, empty, merge, merged_out

ROWS, HEADS, SIZE = 3, 2, 4

CASES = settings(max_examples=60, deadline=None)
TOKENS = st.integers(1, 40)
SEEDS = st.integers(0, 2**32)
SPREADS = st.sampled_from([0.1, 3.0, 60.0])


def drawn(tokens: int, seed: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Scores [rows, heads, tokens] and values [heads, tokens, size], float64."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(ROWS, HEADS, tokens, generator=generator, dtype=torch.float64) * spread
    return scores, torch.randn(HEADS, tokens, SIZE, generator=generator, dtype=torch.float64)


def attend(scores: Tensor, values: Tensor, with_mass: bool = False) -> Partial:
    """Attention over one part by its definition in float64, rounded to the float32 of a partial."""
    if scores.shape[-1] == 0:
        return empty(ROWS, HEADS, SIZE)
    lse = scores.logsumexp(-1)
    weights = torch.where(lse.unsqueeze(-1) == -torch.inf, 0.0, (scores - lse.unsqueeze(-1)).exp())
    out = torch.einsum("rht,htd->rhd", weights, values)
    return Partial(out.float(), lse.float(), weights.float() if with_mass else None)


def split(scores: Tensor, values: Tensor, cuts: Sequence[int]) -> list[Partial]:
    """Partials of the token ranges between the cuts; equal cuts make empty shards."""
    tokens = scores.shape[-1]
    edges = [0, *sorted(min(cut, tokens) for cut in cuts), tokens]
    return [attend(scores[..., a:b], values[:, a:b]) for a, b in pairwise(edges)]


def assert_equal(left: Partial, right: Partial) -> None:
    """Equal up to rounding: an lse of size s is off by s 2^-24, and weights by a few times as much."""
    finite = right.lse.isfinite()
    assert torch.equal(left.lse.isfinite(), finite)
    size = float(right.lse[finite].abs().max()) if finite.any() else 0.0
    tolerance = 1e-5 + 4 * size * 2.0**-24
    torch.testing.assert_close(left.lse, right.lse, atol=tolerance, rtol=0)
    torch.testing.assert_close(left.out, right.out, atol=4 * tolerance, rtol=0)


@CASES
@given(tokens=TOKENS, seed=SEEDS, spread=SPREADS, cuts=st.lists(st.integers(0, 40), max_size=6))
def test_any_split_equals_no_split(tokens: int, seed: int, spread: float, cuts: list[int]) -> None:
    """Parts of any number and size, empty ones included, merge to attention over the whole."""
    scores, values = drawn(tokens, seed, spread)
    assert_equal(merge(split(scores, values, cuts)), attend(scores, values))


@CASES
@given(tokens=st.integers(3, 40), seed=SEEDS, spread=SPREADS, order=st.permutations(range(4)))
def test_merge_is_commutative(tokens: int, seed: int, spread: float, order: list[int]) -> None:
    """The order of the parts changes rounding only."""
    parts = split(*drawn(tokens, seed, spread), [tokens // 4, tokens // 2, tokens - 1])
    assert_equal(merge([parts[i] for i in order]), merge(parts))


@CASES
@given(tokens=st.integers(3, 40), seed=SEEDS, spread=SPREADS)
def test_merge_is_associative(tokens: int, seed: int, spread: float) -> None:
    """Merging early or late changes rounding only: partials may be combined on the way."""
    first, second, third = split(*drawn(tokens, seed, spread), [tokens // 3, tokens // 2])
    assert_equal(merge([merge([first, second]), third]), merge([first, merge([second, third])]))
    assert_equal(merge([merge([first, second]), third]), merge([first, second, third]))


@CASES
@given(tokens=TOKENS, seed=SEEDS)
def test_empty_shard_is_the_identity(tokens: int, seed: int) -> None:
    """An empty shard, on either side, changes no bit."""
    partial, nothing = attend(*drawn(tokens, seed)), empty(ROWS, HEADS, SIZE)
    for merged in (merge([partial, nothing]), merge([nothing, partial])):
        assert torch.equal(merged.out, partial.out)
        assert torch.equal(merged.lse, partial.lse)


@CASES
@given(tokens=TOKENS, seed=SEEDS, constant=st.floats(-1000, 1000))
def test_a_constant_added_to_all_scores_changes_nothing(tokens: int, seed: int, constant: float) -> None:
    """It moves every lse by itself and no output."""
    scores, values = drawn(tokens, seed)
    plain = merge(split(scores, values, [tokens // 2]))
    moved = merge(split(scores + constant, values, [tokens // 2]))
    tolerance = 1e-5 + 16 * abs(constant) * 2.0**-24
    torch.testing.assert_close(moved.lse - constant, plain.lse, atol=tolerance, rtol=1e-5)
    torch.testing.assert_close(moved.out, plain.out, atol=4 * tolerance, rtol=0)


@CASES
@given(tokens=TOKENS, seed=SEEDS, masked=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))
def test_fully_masked_rows_stay_empty_and_spoil_no_other(tokens: int, seed: int, masked: list[bool]) -> None:
    """A row that sees nothing in any part has out 0 and lse -inf; rows beside it are untouched."""
    scores, values = drawn(tokens, seed)
    scores[torch.tensor(masked)] = -torch.inf
    merged = merge(split(scores, values, [tokens // 3, tokens // 2]))
    assert_equal(merged, attend(scores, values))
    assert (merged.out[torch.tensor(masked)] == 0).all()


def test_rows_masked_in_one_part_only_take_the_other_part() -> None:
    """Causal and window masks empty single rows of a shard."""
    scores, values = drawn(20, 1)
    scores[0, :, :10] = scores[2, :, 10:] = -torch.inf
    parts = split(scores, values, [10])
    merged = merge(parts)
    assert torch.equal(merged.out[0], parts[1].out[0])
    assert torch.equal(merged.out[2], parts[0].out[2])
    assert_equal(merged, attend(scores, values))


def test_nothing_merged_with_nothing_is_nothing() -> None:
    """All shards empty: zero and -inf, never NaN."""
    merged = merge([empty(ROWS, HEADS, SIZE)] * 3)
    assert (merged.out == 0).all()
    assert (merged.lse == -math.inf).all()


@CASES
@given(seed=SEEDS)
def test_one_token_per_shard(seed: int) -> None:
    """The finest split: every token its own shard."""
    scores, values = drawn(24, seed)
    assert_equal(merge(split(scores, values, range(1, 24))), attend(scores, values))


@CASES
@given(seed=SEEDS)
def test_very_unequal_shards(seed: int) -> None:
    """4,095 tokens beside one."""
    scores, values = drawn(4096, seed)
    assert_equal(merge(split(scores, values, [4095])), attend(scores, values))


@CASES
@given(seed=SEEDS, sign=st.sampled_from([-1.0, 1.0]), tokens=st.integers(2, 40))
def test_scores_that_overflow_float16(seed: int, sign: float, tokens: int) -> None:
    """Scores near 100,000 merge to a finite result within what float32 can hold of an lse."""
    scores, values = drawn(tokens, seed)
    scores += sign * 1e5
    merged = merge(split(scores, values, [tokens // 2]))
    assert merged.out.isfinite().all()
    assert merged.lse.isfinite().all()
    assert_equal(merged, attend(scores, values))


@CASES
@given(seed=SEEDS)
def test_a_dominant_part_wins_exactly(seed: int) -> None:
    """A part 1e5 below weighs nothing, and its exponential neither overflows nor spoils the sum."""
    low, high = attend(*drawn(9, seed)), attend(*drawn(9, seed + 1))
    far = Partial(high.out, high.lse + 1e5)
    assert torch.equal(merge([low, far]).out, high.out)
    assert torch.equal(merge([far, low]).lse, far.lse)


def test_mass_becomes_the_weights_over_the_whole() -> None:
    """Per-token weights rescale to the softmax over all parts, in the order of the parts."""
    scores, values = drawn(30, 3)
    parts = [attend(scores[..., a:b], values[:, a:b], with_mass=True) for a, b in ((0, 11), (11, 30))]
    merged = merge(parts)
    assert merged.mass is not None
    torch.testing.assert_close(merged.mass, scores.softmax(-1).float(), atol=1e-6, rtol=1e-5)
    assert merge([parts[0], attend(scores[..., 11:], values[:, 11:])]).mass is None


def test_merging_leaves_its_inputs_alone() -> None:
    """Partials may be views into buffers that are read again."""
    parts = split(*drawn(10, 4), [4])
    copies = [(part.out.clone(), part.lse.clone()) for part in parts]
    merge(parts)
    assert all(
        torch.equal(p.out, o) and torch.equal(p.lse, s) for p, (o, s) in zip(parts, copies, strict=True)
    )


def test_shapes_and_dtypes_are_checked() -> None:
    """A partial in another precision or shape is a bug of ours and stops at once."""
    with pytest.raises(AssertionError, match="float32"):
        Partial(torch.zeros(1, 1, 1, dtype=torch.float16), torch.zeros(1, 1))
    with pytest.raises(AssertionError, match="lse"):
        Partial(torch.zeros(2, 1, 1), torch.zeros(1, 1))


@CASES
@given(SEEDS, SPREADS, st.booleans())
def test_two_parts_merge_by_one_weight(seed: int, spread: float, is_empty: bool) -> None:
    """`merged_out` is the output of `merge`, however far the sums are apart, and for an empty shard too."""
    generator = torch.Generator().manual_seed(seed)
    own = Partial(
        torch.randn(ROWS, HEADS, SIZE, generator=generator),
        torch.randn(ROWS, HEADS, generator=generator) * spread,
    )
    other = Partial(
        torch.randn(ROWS, HEADS, SIZE, generator=generator),
        torch.randn(ROWS, HEADS, generator=generator) * spread,
    )
    if is_empty:
        other = empty(ROWS, HEADS, SIZE)
    found = merged_out(own, other.out, other.lse)
    torch.testing.assert_close(found, merge([own, other]).out, atol=1e-6, rtol=1e-6)
