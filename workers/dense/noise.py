"""Counter noise for sampling: a pure function of (seed, choice, output index, token id).

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) is a
counter-based generator: its n-th output is mix(key + n x golden). The key absorbs seed, choice and
output index by the same mix; the token id is n. Nothing else enters, so a token is the same on any
worker, in any batch, and after a take-over in the middle of a sequence.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, odd: SplitMix64's increment."""

_WORD = 2**64 - 1
_FIRST_FACTOR, _SECOND_FACTOR = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def stream_key(seed: int, choice: int, output_index: int) -> int:
    """The 64-bit key of one token's noise."""
    key = 0
    for word in (seed, choice, output_index):
        key = _mix_word(((key ^ word) + GOLDEN) & _WORD)
    return key


def uniforms(key: int, token_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in (0, 1) per token id, never 0 or 1, on a grid of 2^-52."""
    bits = _mix(_steps(token_ids) + np.uint64(key))
    # 52 bits and a half: exact in float64, so that the largest does not round to 1.
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gumbels(key: int, token_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Standard Gumbel noise per token id: the argmax of logits + noise is a draw from their softmax."""
    return -np.log(-np.log(uniforms(key, token_ids)))


@cache
def vocabulary_ids(vocabulary_size: int) -> NDArray[np.int64]:
    """0..vocabulary_size - 1, made once; do not write into it."""
    ids = np.arange(vocabulary_size, dtype=np.int64)
    ids.flags.writeable = False
    return ids


def _steps(token_ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """n x golden with n = token id + 1; arithmetic of uint64 arrays wraps."""
    return (token_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function over an array."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_FIRST_FACTOR)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_SECOND_FACTOR)
    return words ^ (words >> np.uint64(31))


def _mix_word(word: int) -> int:
    """SplitMix64's output function over one integer."""
    word = (word ^ (word >> 30)) * _FIRST_FACTOR & _WORD
    word = (word ^ (word >> 27)) * _SECOND_FACTOR & _WORD
    return word ^ (word >> 31)
