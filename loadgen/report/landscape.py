"""What came of settings, drawn: each key by itself, pairs of keys, and how a search went. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, combinations
from typing import Any

from loadgen.report import ticks
from loadgen.report.content import Section
from loadgen.report.plot import Line, Plot, Style, Tiles
from loadgen.sweep.load import Course

_BINS = 8
_STRETCH = 10.0
_PAIRS_MOST = 6

_Place = tuple[Mapping[str, Any], float]
"""Settings, the cluster's shape among them, and what they were worth."""


def landscape(courses: Sequence[Course], worth_name: str, *, is_search: bool) -> Section:
    """Of subjects that were set to something; nothing where none was."""
    shapes = {course.cluster for course in courses}
    places: list[_Place] = [
        ({**course.settings, **({"cluster": course.cluster} if len(shapes) > 1 else {})}, course.worth)
        for course in courses
        if course.settings
    ]
    keys = list(dict.fromkeys(key for settings, _ in places for key in settings))
    if not keys or len(places) < 2:
        return Section("Landscape")
    slices = [_slice(key, places, worth_name) for key in keys if _is_numeric(key, places)]
    pairs = list(combinations(keys, 2))[:_PAIRS_MOST]
    maps = [_map(first, second, places, worth_name) for first, second in pairs]
    alone = [_map(key, key, places, worth_name) for key in keys if len(keys) == 1 and not slices]
    words = (
        f"Every setting that was tried, by its {worth_name}; 0 where the load was not borne. Such landscapes "
        "are irregular, with sharp peaks: do not read more between the points than is there."
    )
    progress = (_progress(places, worth_name),) if is_search else ()
    return Section("Landscape", words, plots=(*progress, *slices), tiles=(*maps, *alone))


def _is_numeric(key: str, places: Sequence[_Place]) -> bool:
    values = [settings[key] for settings, _ in places if key in settings]
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _slice(key: str, places: Sequence[_Place], worth_name: str) -> Plot:
    found = sorted((float(settings[key]), worth) for settings, worth in places if key in settings)
    xs, ys = (tuple(values) for values in zip(*found, strict=True))
    line = Line(key, xs, ys, Style.POINTS)
    return Plot(
        key, "a setting each, whatever the other keys are", key, worth_name, (line,), is_log=_is_log(xs)
    )


def _progress(places: Sequence[_Place], worth_name: str) -> Plot:
    worths = [worth for _, worth in places]
    numbers = tuple(float(number) for number in range(1, len(worths) + 1))
    lines = (
        Line("trial", numbers, tuple(worths), Style.POINTS),
        Line("best so far", numbers, tuple(accumulate(worths, max)), Style.STEPS),
    )
    return Plot("Course of the search", "in the order of trials", "trial", worth_name, lines)


def _map(x_key: str, y_key: str, places: Sequence[_Place], worth_name: str) -> Tiles:
    """The best of each pair of bins; a key by itself is a row."""
    columns, x_names = _binned([settings.get(x_key) for settings, _ in places])
    rows, y_names = _binned([settings.get(y_key) for settings, _ in places])
    if x_key == y_key:
        rows, y_names = [0] * len(places), ("",)
    values: dict[tuple[int, int], float] = {}
    for column, row, (_, worth) in zip(columns, rows, places, strict=True):
        values[column, row] = max(worth, values.get((column, row), 0.0))
    title = x_key if x_key == y_key else f"{x_key} and {y_key}"
    caption = f"the best {worth_name} found in each tile; blank is not tried"
    return Tiles(title, caption, x_key, "" if x_key == y_key else y_key, x_names, y_names, values)


def _binned(values: Sequence[Any]) -> tuple[list[int], tuple[str, ...]]:
    """Of each value its bin; and names of bins. Few values are bins themselves."""
    kinds = list(dict.fromkeys(values))
    is_numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in kinds)
    if is_numeric:
        kinds.sort()
    if len(kinds) <= _BINS or not is_numeric:
        return [kinds.index(value) for value in values], tuple(_name(value) for value in kinds)
    low, high, is_log = kinds[0], kinds[-1], _is_log(kinds)
    scale = math.log if is_log else float
    width = (scale(high) - scale(low)) / _BINS
    edges = [scale(low) + number * width for number in range(_BINS)]
    places = [min(_BINS - 1, int((scale(value) - scale(low)) / width)) for value in values]
    return places, tuple(f"{ticks.text(round(math.exp(edge) if is_log else edge, 3))} –" for edge in edges)


def _name(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return ticks.text(value)
    return "as configured" if value is None else str(value)


def _is_log(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) >= _STRETCH * min(values)
