"""What a page holds, as data for its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadgen.metrics import SETTING, Summary, definition
from loadgen.report import ticks
from loadgen.report.plot import Plot, Tiles


@dataclass(frozen=True, slots=True)
class Card:
    """A headline figure."""

    name: str
    key: str
    value: str
    beside: str
    meaning: str


@dataclass(frozen=True, slots=True)
class CardGroup:
    """The headline figures of a stage, or of a run."""

    title: str
    cards: tuple[Card, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of words; the columns in `wordy` are set to the left, as the first is."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    wordy: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a bar; the shares of a bar make 1."""

    name: str
    share: float
    value: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A whole and its parts."""

    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with what is under it."""

    title: str
    words: str = ""
    bars: tuple[Bar, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    tiles: tuple[Tiles, ...] = ()


@dataclass(frozen=True, slots=True)
class Figure:
    """A key of the summaries, its value in each column, and its definition."""

    key: str
    texts: tuple[str, ...]
    meaning: str


@dataclass(frozen=True, slots=True)
class Content:
    """A whole page. `columns` are the stages, or runs, whose figures are listed at its end."""

    title: str
    subtitle: str
    warnings: tuple[str, ...]
    cards: tuple[CardGroup, ...]
    sections: tuple[Section, ...]
    columns: tuple[str, ...]
    figures: tuple[Figure, ...]


_HEADLINES = (
    ("Requests", "request_throughput", "/s"),
    ("Output", "output_throughput", "tokens/s"),
    ("Goodput", "request_goodput", "requests/s"),
    ("TTFT, median", "median_ttft_ms", "ms"),
    ("TPOT, median", "median_tpot_ms", "ms"),
    ("ITL, p99", "p99_itl_ms", "ms"),
    ("End to end", "median_e2el_ms", "ms"),
)
_TAILS = {"median_ttft_ms": "p99_ttft_ms", "median_tpot_ms": "p99_tpot_ms", "median_e2el_ms": "p99_e2el_ms"}


def text(value: Any) -> str:
    """A figure as the page writes it: a dash for what was not measured."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return (
            f"{value:,.2f}"
            if 1 <= abs(value) < 1000
            else f"{value:,.3g}"
            if abs(value) < 1
            else f"{value:,.0f}"
        )
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_short(part)}" for name, part in value.items()) or "none"
    return str(value)


def _short(value: Any) -> str:
    return ticks.text(value) if isinstance(value, float) else text(value)


def headlines(title: str, summary: Summary) -> CardGroup:
    """A stage's; an objective that was not set has no goodput to show."""
    cards = [
        Card(
            "Completed",
            "completed",
            text(summary["completed"]),
            f"of {summary['planned']:,}, {summary['failed']:,} failed",
            definition("completed"),
        )
    ]
    for name, key, unit in _HEADLINES:
        if key != "request_goodput" or summary[key] is not None:
            tail = f" · p99 {text(summary[_TAILS[key]])}" if key in _TAILS else ""
            cards.append(Card(name, key, text(summary[key]), unit + tail, definition(key)))
    if summary.get("usd_per_mtok") is not None:
        value, rate = text(summary["usd_per_mtok"]), text(summary["tokens_per_usd"])
        meaning = definition("usd_per_mtok")
        cards.append(Card("Cost", "usd_per_mtok", f"${value}", f"/Mtok · {rate} tokens/$", meaning))
    return CardGroup(title, tuple(cards))


def figures(summaries: Sequence[Summary]) -> tuple[Figure, ...]:
    """Every figure of the summaries, in their order."""
    keys = dict.fromkeys(key for summary in summaries for key in summary)
    return tuple(
        Figure(key, tuple(text(summary.get(key)) for summary in summaries), definition(key))
        for key in keys
        if key not in SETTING and key != "warnings"
    )
