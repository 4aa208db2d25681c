"""When requests are due: point processes, drawn whole before a run. Pure.

Each gap is drawn to its end, and times are neither cut to fit nor stretched to meet a rate afterwards: a
tail that is cut adds load, and seconds that are rescaled lie on a grid. The first gap is the rest of one that
began before the run (the equilibrium renewal process; Cox, Renewal Theory, 1962, 2.2): with it the expected
number of arrivals by t is exactly rate * t, which for bursty processes it otherwise is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidRequest

Seconds: TypeAlias = NDArray[np.float64]
"""Ascending moments since the run began, [arrivals]."""

_DRAWN_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Limit:
    """Where a schedule ends: after this many arrivals, before this moment, or at whichever comes first."""

    requests: int | None = None
    duration_s: float | None = None

    def __post_init__(self) -> None:
        if self.requests is None and self.duration_s is None:
            raise InvalidRequest("say how many requests to send, or for how long")

    def cut(self, times_s: Seconds) -> Seconds:
        """The moments within the limit."""
        kept = times_s if self.duration_s is None else times_s[times_s < self.duration_s]
        return kept[: self.requests]


class Arrivals(Protocol):
    """One kind of arrival process."""

    def times_s(self, random: np.random.Generator, limit: Limit) -> Seconds:
        """A schedule; the same generator state gives the same one."""
        ...


@dataclass(frozen=True, slots=True)
class Gamma:
    """Independent gaps of a gamma distribution: mean 1 / `rate` seconds, coefficient of variation `cv`.

    cv 1 is the Poisson process; above it arrivals are bursty, below it they are even.
    """

    rate: float
    cv: float

    def __post_init__(self) -> None:
        _require_positive(rate=self.rate, cv=self.cv)

    def times_s(self, random: np.random.Generator, limit: Limit) -> Seconds:
        """See `Arrivals`."""
        shape = self.cv**-2
        scale_s = 1 / (self.rate * shape)
        # A gap met at a random moment is one drawn by its length, of which a uniform share is left.
        first_s = random.random() * random.gamma(shape + 1, scale_s)
        return _renewal(first_s, lambda count: random.gamma(shape, scale_s, count), limit)


def poisson(rate: float) -> Gamma:
    """Independent exponential gaps."""
    return Gamma(rate, 1.0)


@dataclass(frozen=True, slots=True)
class Weibull:
    """Independent gaps of a Weibull distribution: mean 1 / `rate` seconds; `shape` below 1 is bursty."""

    rate: float
    shape: float

    def __post_init__(self) -> None:
        _require_positive(rate=self.rate, shape=self.shape)

    def times_s(self, random: np.random.Generator, limit: Limit) -> Seconds:
        """See `Arrivals`."""
        scale_s = 1 / (self.rate * math.gamma(1 + 1 / self.shape))
        # As for Gamma: x^shape of a gap drawn by its length is a gamma variable of shape 1 + 1 / shape.
        whole_s = scale_s * random.gamma(1 + 1 / self.shape) ** (1 / self.shape)
        first_s = random.random() * whole_s
        return _renewal(first_s, lambda count: scale_s * random.weibull(self.shape, count), limit)


@dataclass(frozen=True, slots=True)
class Constant:
    """Equal gaps; the first arrival is at 0."""

    rate: float

    def __post_init__(self) -> None:
        _require_positive(rate=self.rate)

    def times_s(self, random: np.random.Generator, limit: Limit) -> Seconds:  # noqa: ARG002  see `Arrivals`
        """See `Arrivals`."""
        most = None if limit.duration_s is None else int(np.ceil(limit.duration_s * self.rate))
        count = min(value for value in (most, limit.requests) if value is not None)
        return limit.cut(np.arange(count) / self.rate)


@dataclass(frozen=True, slots=True)
class Ramp:
    """A Poisson process whose rate goes in a straight line from `rate` to `rate_end` over `duration_s`.

    Arrivals of rate 1 are mapped through the inverse of the integrated rate r t + (r' - r) t^2 / 2 d
    (Çinlar, Introduction to Stochastic Processes, 1975, 4.7).
    """

    rate: float
    rate_end: float
    duration_s: float

    def __post_init__(self) -> None:
        _require_positive(rate=self.rate, rate_end=self.rate_end, duration_s=self.duration_s)

    def times_s(self, random: np.random.Generator, limit: Limit) -> Seconds:
        """See `Arrivals`."""
        whole = (self.rate + self.rate_end) / 2 * self.duration_s
        unit = _renewal(
            random.exponential(), lambda count: random.exponential(size=count), Limit(duration_s=whole)
        )
        # The root of the quadratic, in the form that also holds where both rates are the same.
        slope = (self.rate_end - self.rate) / self.duration_s
        return limit.cut(2 * unit / (self.rate + np.sqrt(self.rate**2 + 2 * slope * unit)))


@dataclass(frozen=True, slots=True)
class Replay:
    """Recorded moments, `speed` times as fast."""

    recorded_s: tuple[float, ...]
    speed: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(speed=self.speed)

    def times_s(self, random: np.random.Generator, limit: Limit) -> Seconds:  # noqa: ARG002  see `Arrivals`
        """See `Arrivals`."""
        recorded_s = np.sort(np.array(self.recorded_s, dtype=np.float64))
        return limit.cut((recorded_s - recorded_s[0]) / self.speed)


def spread(times_s: Seconds, random: np.random.Generator) -> Seconds:
    """Ascending moments of which many are the same, because their recorder rounded: those of one stamp lie
    independently and uniformly between it and the next stamp; those of the last one as far as before it.
    """
    stamps, which, counts = np.unique(times_s, return_inverse=True, return_counts=True)
    if len(stamps) < 2 or counts.max() == 1:
        return times_s
    steps_s = np.diff(stamps)
    return np.sort(times_s + np.append(steps_s, steps_s[-1])[which] * random.random(len(times_s)))


def _renewal(first_s: float, gaps_s: Callable[[int], Seconds], limit: Limit) -> Seconds:
    """`first_s`, and gaps added to it until the limit is passed."""
    parts, count, last_s = [np.array([first_s])], 1, first_s
    while (limit.requests is None or count < limit.requests) and (
        limit.duration_s is None or last_s < limit.duration_s
    ):
        parts.append(last_s + np.cumsum(gaps_s(_DRAWN_AT_ONCE)))
        count, last_s = count + _DRAWN_AT_ONCE, float(parts[-1][-1])
    return limit.cut(np.concatenate(parts))


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < np.inf:
            raise InvalidRequest(f"{name} of arrivals is {value:g}, must be above 0")
