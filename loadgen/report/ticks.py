"""Where the marks of an axis are: round numbers. Pure."""

from __future__ import annotations

import math

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_BEYOND_S = 1e-9


def linear(low: float, high: float, most: int) -> tuple[float, ...]:
    """At most `most` + 1 round numbers in low..high."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in _STEPS if factor * power >= rough * (1 - _BEYOND_S))
    first, last = math.ceil(low / step - _BEYOND_S), math.floor(high / step + _BEYOND_S)
    return tuple(number * step for number in range(first, last + 1))


def logarithmic(low: float, high: float, most: int) -> tuple[float, ...]:
    """Powers of ten in low..high, with 2 and 5 of each where there is room."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = tuple(f * 10.0**power for power in powers for f in factors if low <= f * 10.0**power <= high)
        if len(found) <= most:
            return found
    every = math.ceil(len(found) / most)
    return found[::every]


def text(value: float) -> str:
    """A number as short as its size allows: 0.25, 12, 4,000, 1.5M."""
    for unit, name in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
