"""What differs from cluster to cluster: keys of the configuration with their values. Pure.

dense.step_tokens=512,2048      these values
dense.max_batch=16..1024        any value from .. to, which only a search can draw
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

from cluster.errors import InvalidRequest

_SPAN = re.compile(r"(-?[\d.]+?)\.\.(-?[\d.]+)")
_LOGARITHMIC = 10.0


@dataclass(frozen=True, slots=True)
class Choice:
    """Some values of a key."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """All values of a key between two."""

    key: str
    low: float
    high: float
    is_whole: bool

    @property
    def is_log(self) -> bool:
        """Whether it is drawn from by its logarithm: where its ends are far apart."""
        return self.low > 0 and self.high >= _LOGARITHMIC * self.low


Dimension: TypeAlias = Choice | Span


def parse(text: str) -> Dimension:
    """`KEY=A,B,C` or `KEY=LOW..HIGH`. Raises InvalidRequest for anything else."""
    key, equals, values = text.partition("=")
    if not (key and equals and values):
        raise InvalidRequest(f"--vary {text}: write KEY=A,B,C or KEY=LOW..HIGH")
    if (span := _SPAN.fullmatch(values)) is None:
        return Choice(key, tuple(yaml.safe_load(value) for value in values.split(",")))
    try:
        low, high = float(span[1]), float(span[2])
    except ValueError as error:
        raise InvalidRequest(f"--vary {text}: {values} is no range of numbers") from error
    if not low < high:
        raise InvalidRequest(f"--vary {text}: a range goes from the lower to the higher number")
    return Span(key, low, high, is_whole="." not in span[1] + span[2])


def grid(dimensions: Sequence[Dimension]) -> Iterator[dict[str, Any]]:
    """Every combination of values. Raises InvalidRequest for a span, which has no end of them."""
    choices = []
    for dimension in dimensions:
        if isinstance(dimension, Span):
            raise InvalidRequest(f"{dimension.key} is a range, from which only --search TRIALS draws")
        choices.append(dimension.values)
    for values in itertools.product(*choices):
        yield {dimension.key: value for dimension, value in zip(dimensions, values, strict=True)}


def named(cluster: str, settings: Mapping[str, Any]) -> str:
    """A subject's name: its cluster and what it is set to."""
    return ", ".join([cluster, *(f"{key} {value}" for key, value in settings.items())])
