"""What is drawn, as data: nothing here knows how. Tests read the plots' numbers from these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Style(StrEnum):
    """How a line joins its points."""

    STRAIGHT = "straight"
    STEPS = "steps"
    """A value holds until the next."""
    POINTS = "points"
    """Not at all."""


@dataclass(frozen=True, slots=True)
class Line:
    """One series."""

    name: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    style: Style = Style.STRAIGHT


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line with a word."""

    x: float
    name: str


@dataclass(frozen=True, slots=True)
class Plot:
    """One picture. Its vertical axis begins at 0."""

    title: str
    caption: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...] = ()
    is_log: bool = False
    """Whether the horizontal axis is logarithmic; its values are above 0 then."""
    x_span: tuple[float, float] | None = None
    """Ends of the horizontal axis; None: by the data."""
    y_most: float | None = None
    """Top of the vertical axis; None: by the data."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to see."""
        return not any(line.xs for line in self.lines)


@dataclass(frozen=True, slots=True)
class Tiles:
    """A picture of values over two keys, each of a few values or ranges of them: the higher, the darker."""

    title: str
    caption: str
    x_label: str
    y_label: str
    x_names: tuple[str, ...]
    """Of the columns, left to right."""
    y_names: tuple[str, ...]
    """Of the rows, bottom to top."""
    values: Mapping[tuple[int, int], float]
    """By (column, row), at least 0; a tile without a value was not tried."""
