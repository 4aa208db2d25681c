"""Results as a table: value, floor, what is asked, and how far samples spread; a floor stands in its row."""

from __future__ import annotations

import statistics
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from anabranch.cli.bench.records import Record, Results, is_within_bound, records

_SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")),
    "B/s": ((1e9, "GB/s"), (1e6, "MB/s"), (1.0, "B/s")),
}


def results_table(results: Results) -> Table:
    """One row a record."""
    table = Table(box=box.SIMPLE)
    table.add_column("what", no_wrap=True)
    for column in ("median", "floor", "asked", "of", "spread"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, record in records(results):
        if name.endswith(".floor"):
            continue
        table.add_row(name, *_cells(record))
    return table


def _cells(record: Record) -> tuple[Text | str, ...]:
    unit = record.get("unit", "") if record["kind"] in ("figure", "fit") else ""
    kept = is_within_bound(record)
    style = {None: "", True: "green", False: "red"}[kept]
    floor = record.get("floor")
    return (
        Text(quantity(record["value"], unit), style=style),
        quantity(floor["value"], unit) if floor else "",
        _asked(record),
        _of(record),
        _spread(record),
    )


def quantity(value: float, unit: str) -> str:
    """A number in the unit that keeps it readable."""
    for scale, name in _SCALES.get(unit, ()):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {name}"
    return f"{value:.3f}" if not unit else f"{value:.4g} {unit}"


def _asked(record: Record) -> str:
    bound: dict[str, Any] = record.get("bound") or {}
    words = {"least": ">=", "most": "<="}
    return " ".join(f"{words[key]} {value:g}" for key, value in bound.items() if value is not None)


def _of(record: Record) -> str:
    if record["kind"] == "ratio":
        sides = [quantity(statistics.median(record[side]["samples"]), record["unit"]) for side in ("a", "b")]
        return " / ".join(sides)
    return str(record.get("equation", ""))


def _spread(record: Record) -> str:
    """The middle half of the samples over their median."""
    samples = record["a"]["samples"] if record["kind"] == "ratio" else record.get("samples", [])
    middle = statistics.median(samples) if samples else 0.0
    if len(samples) < 4 or middle == 0:
        return ""
    low, _, high = statistics.quantiles(samples, n=4)
    return f"{(high - low) / middle:.0%}"
