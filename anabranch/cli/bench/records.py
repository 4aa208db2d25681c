"""What a bench writes down, and how each number follows from its samples. Pure.

Results are nested mappings; a leaf is a record, told by its `kind`:

    figure      value = median of `samples`; `floor`: what `cluster.perfmodel` says cannot be beaten, in the
                same unit: a prediction, or null
    ratio       value = median of a / median of b, or 1 - that; `bound` is what is asked of it
    least, most value = the least or greatest of the records in `of`
    prediction  value = the equation of `cluster.perfmodel` called `equation` with `inputs`
    fit         value = `part` of the line through the medians of `points`, [x, samples] each
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from cluster import perfmodel
from cluster.errors import InvalidRequest

Record = dict[str, Any]
Results = dict[str, Any]
"""Records in nested mappings and lists, ready for JSON."""

_TOLERANCE = 1e-9
"""Relative: JSON keeps every bit of a float, so a recomputed value differs by rounding at most."""

_KINDS = ("figure", "ratio", "least", "most", "prediction", "fit")


def figure(
    samples: Sequence[float],
    unit: str,
    *,
    floor: Record | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Record:
    """A measured quantity; `floor`, a prediction, in the same unit."""
    record: Record = {"kind": "figure", "value": statistics.median(samples), "unit": unit}
    record |= {"floor": floor, "samples": list(samples), "settings": dict(settings or {})}
    return record


def ratio(
    a: tuple[str, Sequence[float]],
    b: tuple[str, Sequence[float]],
    unit: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    complement: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Record:
    """a / b (or 1 - a / b) of two named lists of samples in one unit, taken in one run.

    `settings`: what made the samples what they are, those of the peer included.
    """
    form: Literal["a/b", "1-a/b"] = "1-a/b" if complement else "a/b"
    record: Record = {
        "kind": "ratio",
        "form": form,
        "a": {"name": a[0], "samples": list(a[1])},
        "b": {"name": b[0], "samples": list(b[1])},
        "unit": unit,
        "bound": {"least": at_least, "most": at_most},
        "settings": dict(settings or {}),
    }
    return {**record, "value": _computed(record)}


def extreme(
    kind: Literal["least", "most"],
    of: Mapping[str, Record],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Record:
    """The worst of several records, all of which are kept."""
    record: Record = {"kind": kind, "of": dict(of), "bound": {"least": at_least, "most": at_most}}
    return {**record, "value": _computed(record)}


def prediction(equation: str, inputs: Mapping[str, float]) -> Record:
    """What an equation of `cluster.perfmodel` says to measured inputs."""
    record: Record = {"kind": "prediction", "equation": equation, "inputs": dict(inputs)}
    return {**record, "value": _computed(record)}


def fits(points: Mapping[float, Sequence[float]], unit: str) -> Results:
    """The line through the medians of samples by x, each x counting alike (`perfmodel.Line.evenly`):
    `slope`, `intercept`, `r2`, and `deviation_max`, the farthest any median lies from it, relative to itself.
    """
    kept = [[x, list(samples)] for x, samples in points.items()]
    found: Results = {}
    for part in ("slope", "intercept", "r2", "deviation_max"):
        record: Record = {"kind": "fit", "part": part, "points": kept}
        record["unit"] = unit if part in ("slope", "intercept") else ""
        found[part] = {**record, "value": _computed(record)}
    return found


def records(results: Any, name: str = "") -> Iterator[tuple[str, Record]]:
    """Every record of results under its dotted name, those inside an extreme and floors included."""
    if isinstance(results, Mapping):
        if results.get("kind") in _KINDS:
            yield name, dict(results)
            results = _inner(results)
        for key, value in results.items():
            yield from records(value, f"{name}.{key}" if name else str(key))
    elif isinstance(results, list):
        for index, value in enumerate(results):
            yield from records(value, f"{name}[{index}]")


def differences(results: Any) -> list[str]:
    """A line for each record whose value does not follow from what it carries, by name."""
    found: list[str] = []
    for name, record in records(results):
        try:
            computed = _computed(record)
        except (InvalidRequest, KeyError, TypeError, ZeroDivisionError, statistics.StatisticsError) as error:
            found.append(f"{name}: cannot be recomputed: {type(error).__name__}: {error}")
            continue
        value = record.get("value")
        if not isinstance(value, int | float) or not math.isclose(value, computed, rel_tol=_TOLERANCE):
            found.append(f"{name}: says {value}, its samples give {computed}")
        if record["kind"] == "ratio" and not (record.get("commit") and record.get("command")):
            found.append(f"{name}: tells no commit or command")
    return found


def is_within_bound(record: Record) -> bool | None:
    """Whether a record keeps what is asked of it; None where nothing is."""
    bound = record.get("bound") or {}
    least, most = bound.get("least"), bound.get("most")
    if least is None and most is None:
        return None
    value = float(record["value"])
    return (least is None or value >= least) and (most is None or value <= most)


def misses(results: Any) -> list[str]:
    """A line for each record that does not keep what is asked of it, by name, and not again for its parts."""
    found: list[str] = []
    for name, record in records(results):
        is_part = any(name.startswith(f"{other}.") for other in (line.partition(":")[0] for line in found))
        if is_within_bound(record) is False and not is_part:
            least, most = record["bound"]["least"], record["bound"]["most"]
            asked = f"at least {least}" if least is not None else f"at most {most}"
            found.append(f"{name}: {record['value']:.3g}, asked: {asked}")
    return found


def _inner(record: Mapping[str, Any]) -> dict[str, Any]:
    """The records a record carries."""
    floor = record.get("floor")
    return {**record.get("of", {}), **({"floor": floor} if floor else {})}


def _fitted(record: Mapping[str, Any]) -> float:
    points = [(float(x), float(statistics.median(samples))) for x, samples in record["points"]]
    line = perfmodel.Line.evenly(points)
    if record["part"] == "r2":
        return line.explained(points)
    if record["part"] == "deviation_max":
        return max(abs(line.at(x) - y) / y for x, y in points)
    return {"slope": line.each_s, "intercept": line.base_s}[record["part"]]


def _computed(record: Mapping[str, Any]) -> float:
    match record["kind"]:
        case "figure":
            return float(statistics.median(record["samples"]))
        case "ratio":
            share = float(statistics.median(record["a"]["samples"]))
            share /= float(statistics.median(record["b"]["samples"]))
            return 1 - share if record["form"] == "1-a/b" else share
        case "least":
            return min(_computed(part) for part in record["of"].values())
        case "most":
            return max(_computed(part) for part in record["of"].values())
        case "prediction":
            equation = perfmodel.EQUATIONS.get(record["equation"])
            if equation is None:
                raise InvalidRequest(f"the performance model has no equation {record['equation']}")
            return float(equation(**record["inputs"]))
        case "fit":
            return _fitted(record)
        case other:
            raise InvalidRequest(f"a record is of no kind {other}")
