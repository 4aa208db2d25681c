"""How long prompts and outputs are: distributions over whole numbers of tokens. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidRequest

Tokens: TypeAlias = NDArray[np.int64]
"""Lengths of at least 1, [requests]."""


class Lengths(Protocol):
    """One distribution."""

    def draw(self, random: np.random.Generator, count: int) -> Tokens:
        """`count` independent lengths."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same."""

    tokens: int

    def __post_init__(self) -> None:
        _require(self.tokens >= 1, f"{self.tokens} tokens are none")

    def draw(self, random: np.random.Generator, count: int) -> Tokens:  # noqa: ARG002  see `Lengths`
        """See `Lengths`."""
        return np.full(count, self.tokens, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every length from `low` to `high`, both included, alike."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _require(1 <= self.low <= self.high, f"{self.low} to {self.high} tokens is no range from 1 upwards")

    def draw(self, random: np.random.Generator, count: int) -> Tokens:
        """See `Lengths`."""
        return random.integers(self.low, self.high, count, endpoint=True)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """A lognormal distribution by its own mean and coefficient of variation, rounded to at least 1."""

    mean: float
    cv: float

    def __post_init__(self) -> None:
        _require(self.mean >= 1 and self.cv > 0, f"mean {self.mean:g}, cv {self.cv:g}: no such lengths")

    def draw(self, random: np.random.Generator, count: int) -> Tokens:
        """See `Lengths`."""
        variance = np.log1p(self.cv**2)
        return _whole(random.lognormal(np.log(self.mean) - variance / 2, np.sqrt(variance), count))


@dataclass(frozen=True, slots=True)
class Quantiles:
    """The distribution whose quantile at each of `levels` (from 0 to 1) is the value of the same place, with
    straight lines between.
    """

    levels: Sequence[float]
    values: Sequence[float]

    def __post_init__(self) -> None:
        assert len(self.levels) == len(self.values) >= 2
        assert self.levels[0] == 0
        assert self.levels[-1] == 1

    def draw(self, random: np.random.Generator, count: int) -> Tokens:
        """See `Lengths`."""
        return _whole(self.shares(random, count))

    def shares(self, random: np.random.Generator, count: int) -> NDArray[np.float64]:
        """The same without rounding: for what is no length."""
        return np.interp(random.random(count), self.levels, self.values)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Lengths with the probability of each, as recorded."""

    tokens: Sequence[int]
    probabilities: Sequence[float]

    def draw(self, random: np.random.Generator, count: int) -> Tokens:
        """See `Lengths`."""
        summed = np.cumsum(self.probabilities)
        # The last sum is 1 but for rounding: a draw beyond it means the last length.
        places = np.searchsorted(summed, random.random(count) * summed[-1], side="right")
        lengths = np.array(self.tokens, dtype=np.float64)[np.minimum(places, len(summed) - 1)]
        return _whole(lengths)


_SPELLINGS: Mapping[str, Callable[[float, float], Lengths]] = {
    "uniform": lambda low, high: Uniform(round(low), round(high)),
    "lognormal": Lognormal,
}


def parse(text: str) -> Lengths:
    """`128`, `uniform:64:256` or `lognormal:MEAN:CV`. Raises InvalidRequest for anything else."""
    name, *numbers = text.split(":")
    try:
        if not numbers:
            return Fixed(int(name))
        first, second = map(float, numbers)
        return _SPELLINGS[name](first, second)
    except (ValueError, KeyError) as error:
        raise InvalidRequest(
            f"{text!r} is no length: write 128, uniform:64:256 or lognormal:MEAN:CV"
        ) from error


def _whole(lengths: NDArray[np.float64]) -> Tokens:
    return np.maximum(1, np.rint(lengths)).astype(np.int64)


def _require(holds: bool, words: str) -> None:
    if not holds:
        raise InvalidRequest(words)
