"""Runs beside each other: differences of their figures, and whether they are more than noise. Pure.

An interval is a percentile bootstrap (Efron 1979): latencies over requests, each drawn with all its gaps;
rates over slices of the counted time, since a rate's noise is that of time (batch means). Requests of one run
wait for each other, so intervals are rather too narrow: repeat a run with other seeds before a small
difference is believed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidRequest
from loadgen.metrics import Summary
from loadgen.records import Outcome, Record
from loadgen.results import Run

DRAWS = 1000
SLICES = 20
_SURE = (2.5, 97.5)
_SEED = 1
_TAILS = (50, 95, 99)
_BESIDE = ("backend", "version", "senders", "objectives_ms", "seed")
"""Settings that may differ in runs of the same load on the same cluster."""
_RATES = ("request_throughput", "output_throughput")

_Values: TypeAlias = NDArray[np.float64]
_Latency: TypeAlias = Callable[[Record], Sequence[float | None]]

_LATENCIES: dict[str, _Latency] = {
    "ttft": lambda record: (record.ttft_s,),
    "tpot": lambda record: (record.tpot_s,),
    "itl": lambda record: record.gaps_s,
    "e2el": lambda record: (record.e2el_s,),
}


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of two runs. `low` and `high` bound the relative difference, `other / base` - 1, at 95 %;
    None where there is too little to draw from.
    """

    key: str
    base: float | None
    other: float | None
    low: float | None
    high: float | None

    @property
    def relative(self) -> float | None:
        """`other / base` - 1."""
        return self.other / self.base - 1 if self.base and self.other is not None else None

    @property
    def verdict(self) -> str:
        """In plain words."""
        if self.relative is None or self.low is None or self.high is None:
            return "cannot be told"
        if self.low <= 0 <= self.high:
            return "within noise"
        return f"{abs(self.relative):.1%} {'higher' if self.relative > 0 else 'lower'}"


@dataclass(frozen=True, slots=True)
class StagePair:
    """A stage of two runs."""

    base: str
    other: str
    """Each as run and stage."""
    differences: tuple[Difference, ...]


def named_apart(paths: Sequence[Path], runs: Sequence[Run]) -> list[Run]:
    """The runs, named by as many of their last folders as it takes to tell them apart. Raises InvalidRequest
    where one is given twice.
    """
    whole = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(names)) == len(names):
            return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    raise InvalidRequest("a run is compared with others, not with itself: a folder is given twice")


def settings(run: Run) -> dict[str, Any]:
    """What was run, by name: model, devices or members, API, and every option of the load."""
    head = run.summaries[0]
    roles = Counter(role for _, role in {(sample.worker_id, sample.role) for sample in run.samples})
    members = ", ".join(f"{count} {role}" for role, count in sorted(roles.items()))
    told = {key: head[key] for key in ("model_id", "backend", "version", "senders", "objectives_ms")}
    return {**told, "shape": head.get("shape"), "members": members, **head["scenario"]}


def apart(base: Run, other: Run) -> str:
    """What two runs were asked, or on what, where it differs: their figures then differ by that, too. Empty
    where it does not; other seeds are the same load.
    """
    ours, theirs = settings(base), settings(other)
    differs = [
        f"{name} {ours.get(name)} and {theirs.get(name)}"
        for name in dict.fromkeys((*ours, *theirs))
        if name not in _BESIDE and ours.get(name) != theirs.get(name)
    ]
    return f"{base.name} and {other.name} differ in {', '.join(differs)}" if differs else ""


def compare(base: Run, other: Run) -> list[StagePair]:
    """Stages of the same name, or the only ones of both runs. Raises InvalidRequest where there are none."""
    theirs = {summary["stage"]: summary for summary in other.summaries}
    pairs = [(ours, theirs[ours["stage"]]) for ours in base.summaries if ours["stage"] in theirs]
    if not pairs and len(base.summaries) == len(other.summaries) == 1:
        pairs = [(base.summaries[0], other.summaries[0])]
    if not pairs:
        raise InvalidRequest(f"{base.name} and {other.name} have no stage in common")
    return [
        StagePair(
            f"{base.name}, {ours['stage']}",
            f"{other.name}, {their['stage']}",
            tuple(_differences((base.records, ours), (other.records, their))),
        )
        for ours, their in pairs
    ]


def _differences(
    base: tuple[Sequence[Record], Summary], other: tuple[Sequence[Record], Summary]
) -> list[Difference]:
    random = np.random.default_rng(_SEED)
    drawn = [{**_drawn_rates(*side, random), **_drawn_latencies(*side, random)} for side in (base, other)]
    keys = (*_RATES, *(f"{statistic}_{name}_ms" for name in _LATENCIES for statistic in _statistics()))
    return [
        Difference(key, base[1][key], other[1][key], *_interval(drawn[0].get(key), drawn[1].get(key)))
        for key in keys
    ]


def _statistics() -> tuple[str, ...]:
    return ("mean", "median", *(f"p{percent}" for percent in _TAILS[1:]))


def _interval(base: _Values | None, other: _Values | None) -> tuple[float | None, float | None]:
    """Of other / base - 1, over independent draws of both."""
    if base is None or other is None or (base <= 0).any():
        return None, None
    low, high = np.percentile(other / base - 1, _SURE)
    return float(low), float(high)


def _measured(records: Sequence[Record], summary: Summary) -> list[Record]:
    return [
        record
        for record in records
        if record.stage == summary["stage"] and not record.warm_up and record.outcome is Outcome.COMPLETED
    ]


def _drawn_rates(
    records: Sequence[Record], summary: Summary, random: np.random.Generator
) -> dict[str, _Values]:
    """Each draw is as many slices of time as there are, with what was completed in them."""
    measured = _measured(records, summary)
    duration_s = summary["duration"]
    if len(measured) < SLICES or duration_s <= 0:
        return {}
    ends_s = np.array([record.ended_s for record in measured])
    until_s = max(r.ended_s for r in records if r.stage == summary["stage"] and not r.warm_up)
    places = ((ends_s - (until_s - duration_s)) / duration_s * SLICES).astype(np.int64)
    places = np.clip(places, 0, SLICES - 1)
    weights: dict[str, Any] = {
        "request_throughput": None,
        "output_throughput": np.array([record.output_tokens for record in measured], dtype=np.float64),
    }
    chosen = random.integers(SLICES, size=(DRAWS, SLICES))
    return {
        key: np.bincount(places, weight, SLICES)[chosen].sum(axis=1) / duration_s
        for key, weight in weights.items()
    }


def _drawn_latencies(
    records: Sequence[Record], summary: Summary, random: np.random.Generator
) -> dict[str, _Values]:
    """Each draw is as many requests as there are; what a request brings counts as often as it was drawn."""
    measured = _measured(records, summary)
    drawn: dict[str, _Values] = {}
    for name, latency in _LATENCIES.items():
        pairs = [
            (value, place)
            for place, record in enumerate(measured)
            for value in latency(record)
            if value is not None
        ]
        owners = {place: number for number, place in enumerate(sorted({place for _, place in pairs}))}
        if len(owners) < 2:
            continue
        pairs.sort()
        values = np.array([value for value, _ in pairs]) * 1000
        places = np.array([owners[place] for _, place in pairs])
        found = np.array([_figures(values, places, len(owners), random) for _ in range(DRAWS)])
        for number, statistic in enumerate(_statistics()):
            drawn[f"{statistic}_{name}_ms"] = found[:, number]
    return drawn


def _figures(
    values: _Values, places: NDArray[np.int64], requests: int, random: np.random.Generator
) -> list[float]:
    """Mean and percentiles of sorted values, of which each counts as often as its request was drawn."""
    counts = np.bincount(random.integers(requests, size=requests), minlength=requests)[places]
    sums = np.cumsum(counts)
    at = np.searchsorted(sums, [percent / 100 * sums[-1] for percent in _TAILS])
    return [float(values @ counts / sums[-1]), *values[at].tolist()]
