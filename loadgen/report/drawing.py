"""Draws `Plot` and `Tiles` as SVG, in the colours of page.html (s0, s1, ...). The one module that draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from loadgen.report import ticks
from loadgen.report.plot import Line, Mark, Plot, Style, Tiles

_WIDTH, _HEIGHT = 560.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 28.0, 42.0
COLOURS = 6
_X_TICKS, _Y_TICKS = 7, 4
_HEADROOM = 1.06
_TILES_LEFT = 110.0
_FAINTEST, _STRONGEST = 0.06, 0.75
"""Opacities of a tile of 0, and of the highest one."""
_NAME_PX = 26.0
"""Marks nearer to each other than this have their words on lines of their own."""


@dataclass(frozen=True, slots=True)
class _Axes:
    """From values to places, in units of the picture."""

    x_low: float
    x_high: float
    y_high: float
    is_log: bool

    @classmethod
    def of(cls, plot: Plot) -> _Axes:
        xs = [x for line in plot.lines for x in line.xs]
        ys = [y for line in plot.lines for y in line.ys]
        low, high = plot.x_span or (min(xs), max(xs))
        if high <= low:
            low, high = (low / 2, low * 2) if plot.is_log else (low - 0.5, low + 0.5)
        top = plot.y_most if plot.y_most is not None else max(ys) * _HEADROOM
        return cls(low, high, top or 1.0, plot.is_log)

    def x(self, value: float) -> float:
        low, high, at = self.x_low, self.x_high, value
        if self.is_log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.x_low))
        return _LEFT + (at - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - value / self.y_high * (_HEIGHT - _TOP - _BOTTOM)


def draw(plot: Plot) -> str:
    """An `svg` element; a plot of nothing is not drawn."""
    assert not plot.is_empty, plot.title
    axes = _Axes.of(plot)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(plot.title)}">',
        *_grid(plot, axes),
        *_marks(plot.marks, axes),
        *(_line(line, axes, number % COLOURS) for number, line in enumerate(plot.lines) if line.xs),
        "</svg>",
    ]
    return "\n".join(parts)


def draw_tiles(tiles: Tiles) -> str:
    """An `svg` element; what was not tried is left blank."""
    width = (_WIDTH - _TILES_LEFT - _RIGHT) / len(tiles.x_names)
    height = (_HEIGHT - _TOP - _BOTTOM) / len(tiles.y_names)
    bottom, most = _HEIGHT - _BOTTOM, max(tiles.values.values(), default=0.0) or 1.0
    parts = [f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(tiles.title)}">']
    for (column, row), value in tiles.values.items():
        x, y = _TILES_LEFT + column * width, bottom - (row + 1) * height
        opacity = _FAINTEST + (_STRONGEST - _FAINTEST) * value / most
        parts.append(
            f'<rect class="tile" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill-opacity="{opacity:.3f}"/>'
        )
        parts.append(_text(x + width / 2, y + height / 2 + 4, ticks.text(value), "middle", "note"))
    for column, name in enumerate(tiles.x_names):
        parts.append(_text(_TILES_LEFT + (column + 0.5) * width, bottom + 16, name, "middle"))
    for row, name in enumerate(tiles.y_names):
        parts.append(_text(_TILES_LEFT - 8, bottom - (row + 0.5) * height + 4, name, "end"))
    parts.append(_text((_TILES_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, tiles.x_label, "middle", "label"))
    parts.append(_text(8, _TOP - 12, tiles.y_label, "start", "label"))
    return "\n".join([*parts, "</svg>"])


def _grid(plot: Plot, axes: _Axes) -> list[str]:
    left, right, bottom = _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    spread = ticks.logarithmic if plot.is_log else ticks.linear
    parts = []
    for value in ticks.linear(0.0, axes.y_high, _Y_TICKS):
        at = axes.y(value)
        parts.append(f'<line class="grid" x1="{left:g}" x2="{right:g}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(left - 8, at + 4, ticks.text(value), "end"))
    for value in spread(axes.x_low, axes.x_high, _X_TICKS):
        at = axes.x(value)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:g}" y2="{bottom + 4:g}"/>')
        parts.append(_text(at, bottom + 18, ticks.text(value), "middle"))
    parts.append(f'<line class="axis" x1="{left:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}"/>')
    parts.append(_text((left + right) / 2, _HEIGHT - 6, plot.x_label, "middle", "label"))
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="label" text-anchor="middle" transform="translate(13 {middle:g}) rotate(-90)">'
        f"{escape(plot.y_label)}</text>"
    )
    return parts


def _marks(marks: tuple[Mark, ...], axes: _Axes) -> list[str]:
    parts: list[str] = []
    before, row = -math.inf, 0
    for mark in sorted(marks, key=lambda mark: mark.x):
        at = axes.x(mark.x)
        row = row + 1 if at - before < _NAME_PX * max(1.0, len(mark.name) / 4) else 0
        before = at
        row %= 2
        is_late = at > _WIDTH - _RIGHT - _NAME_PX * len(mark.name) / 4
        top, bottom = _TOP - 12 - 12 * row, _HEIGHT - _BOTTOM
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{top:g}" y2="{bottom:g}"/>')
        x, anchor = (at - 4, "end") if is_late else (at + 4, "start")
        parts.append(_text(x, _TOP - 4 - 12 * row, mark.name, anchor, "note"))
    return parts


def _line(line: Line, axes: _Axes, colour: int) -> str:
    places = [(axes.x(x), axes.y(y)) for x, y in zip(line.xs, line.ys, strict=True)]
    draws: dict[Style, Callable[[list[tuple[float, float]]], str]] = {
        Style.STRAIGHT: _straight,
        Style.STEPS: _steps,
        Style.POINTS: _points,
    }
    return f'<path class="s{colour} {line.style}" d="{draws[line.style](places)}"/>'


def _straight(places: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _steps(places: list[tuple[float, float]]) -> str:
    first, *rest = places
    return f"M{first[0]:.1f} {first[1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest)


def _points(places: list[tuple[float, float]]) -> str:
    """Lines of no length, of which the round ends are seen."""
    return "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)


def _text(x: float, y: float, words: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
