"""A run's plots. Pure. Times are seconds since the run began, latencies milliseconds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from loadgen.members import Sample
from loadgen.metrics import LATENCIES
from loadgen.records import Outcome, Record
from loadgen.report.plot import Line, Mark, Plot, Style
from loadgen.results import Run

_MARKED = (50, 95, 99)
_BINS = 60
_WIDTHS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)
_POINTS = 400
"""Of a curve: more cannot be seen."""
_STRETCH = 8.0
"""A largest value this many times the median makes an axis logarithmic."""
_AXIS = "seconds since the run began"

_TITLES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}

_Values = NDArray[np.float64]


def latencies(records: Sequence[Record], stage: str) -> dict[str, _Values]:
    """Samples in milliseconds, sorted, of a stage's completed requests after the warm-up."""
    completed = [
        record
        for record in records
        if record.stage == stage and not record.warm_up and record.outcome is Outcome.COMPLETED
    ]
    samples: dict[str, Iterable[float | None]] = {
        "ttft": (record.ttft_s for record in completed),
        "tpot": (record.tpot_s for record in completed),
        "itl": (gap for record in completed for gap in record.gaps_s),
        "e2el": (record.e2el_s for record in completed),
    }
    return {
        name: np.sort(np.array([value for value in values if value is not None], dtype=np.float64)) * 1000
        for name, values in samples.items()
    }


def distributions(runs: Sequence[tuple[str, dict[str, _Values]]]) -> list[Plot]:
    """A cumulative distribution of each latency, a line for each of `runs`, which are named; percentiles are
    marked where there is one.
    """
    plots = []
    for name, title in _TITLES.items():
        lines = tuple(_cumulative(words, samples[name]) for words, samples in runs)
        largest = [
            values[-1] / max(values[len(values) // 2], 1e-9) for _, s in runs if len(values := s[name])
        ]
        smallest = min((float(s[name][0]) for _, s in runs if len(s[name])), default=0.0)
        plots.append(
            Plot(
                title,
                LATENCIES[name],
                "milliseconds",
                "share of requests" if name != "itl" else "share of gaps",
                lines,
                _percentiles(runs[0][1][name]) if len(runs) == 1 else (),
                is_log=smallest > 0 and max(largest, default=0.0) > _STRETCH,
                y_most=1.0,
            )
        )
    return plots


def over_time(run: Run) -> list[Plot]:
    """Rates, requests under way, lateness, and what the members told."""
    records = run.records
    if not records:
        return []
    whole_s = max(record.ended_s for record in records)
    width_s = _width_s(whole_s)
    span_s = (0.0, math.ceil(whole_s / width_s) * width_s)
    plots = [
        _requests(records, width_s),
        _tokens(records, width_s),
        _under_way(records),
        _lag(records),
        *_members(run.samples),
    ]
    return [dataclasses.replace(plot, marks=_stages(records), x_span=span_s) for plot in plots]


def _percentiles(values: _Values) -> tuple[Mark, ...]:
    if not len(values):
        return ()
    return tuple(Mark(float(np.percentile(values, percent)), f"p{percent}") for percent in _MARKED)


def _cumulative(name: str, values: _Values) -> Line:
    """Quantiles at even shares, so that a curve of any sample is as smooth as it can be seen."""
    if not len(values):
        return Line(name, (), ())
    shares = np.linspace(0.0, 1.0, min(len(values), _POINTS)) if len(values) > 1 else np.array([0.0, 1.0])
    return Line(name, tuple(np.quantile(values, shares).tolist()), tuple(shares.tolist()))


def _width_s(span_s: float) -> float:
    return next((width for width in _WIDTHS_S if span_s / width <= _BINS), _WIDTHS_S[-1])


def _stages(records: Sequence[Record]) -> tuple[Mark, ...]:
    """Where each stage after the first begins, and where each warm-up ends."""
    begins: dict[str, float] = {}
    counts: dict[str, float] = {}
    has_warm_up: set[str] = set()
    for record in records:
        begins[record.stage] = min(record.intended_s, begins.get(record.stage, math.inf))
        if record.warm_up:
            has_warm_up.add(record.stage)
        else:
            counts[record.stage] = min(record.intended_s, counts.get(record.stage, math.inf))
    named = [Mark(at_s, stage) for stage, at_s in begins.items()] if len(begins) > 1 else []
    warm = [Mark(counts[stage], "counts from here") for stage in has_warm_up & set(counts)]
    return (*named, *(warm if len(begins) == 1 else ()))


def _per_second(moments_s: Iterable[float], weights: Iterable[float] | None, width_s: float) -> _Values:
    """Sums per bin over the bin's width."""
    places = (np.fromiter(moments_s, dtype=np.float64) / width_s).astype(np.int64)
    values = None if weights is None else np.fromiter(weights, dtype=np.float64)
    return np.bincount(places, values) / width_s


def _binned(name: str, rates: _Values, width_s: float) -> Line:
    """A step for each bin, and one that ends the last."""
    edges = np.arange(len(rates) + 1) * width_s
    return Line(name, tuple(edges.tolist()), (*rates.tolist(), float(rates[-1])), Style.STEPS)


def _requests(records: Sequence[Record], width_s: float) -> Plot:
    moments: dict[str, list[float]] = {
        "due": [record.intended_s for record in records],
        "sent": [record.sent_s for record in records if record.sent_s is not None],
        "completed": [record.ended_s for record in records if record.outcome is Outcome.COMPLETED],
        "failed": [record.ended_s for record in records if record.outcome is Outcome.FAILED],
    }
    lines = tuple(
        _binned(name, _per_second(found, None, width_s), width_s) for name, found in moments.items() if found
    )
    caption = f"asked for and achieved, over {width_s:g} s each"
    return Plot("Requests per second", caption, _AXIS, "requests/s", lines)


def _tokens(records: Sequence[Record], width_s: float) -> Plot:
    moments: list[float] = []
    weights: list[float] = []
    for record in records:
        # An API that does not tell how many tokens a delta holds has its output spread over its deltas.
        even = record.output_tokens / len(record.deltas_s) if record.deltas_s else 0.0
        moments += record.deltas_s
        weights += record.delta_tokens or [even] * len(record.deltas_s)
    rates = _per_second(moments, weights, width_s)
    lines = (_binned("output tokens", rates, width_s),) if len(rates) else ()
    caption = f"as they arrived, those of requests that failed too, over {width_s:g} s each"
    return Plot("Output tokens per second", caption, _AXIS, "tokens/s", lines)


def _under_way(records: Sequence[Record]) -> Plot:
    changes = sorted(
        change
        for record in records
        if record.sent_s is not None
        for change in ((record.sent_s, 1), (record.ended_s, -1))
    )
    moments = np.array([moment for moment, _ in changes])
    counts = np.cumsum([step for _, step in changes])
    every = max(1, len(changes) // (2 * _POINTS))
    line = Line("under way", tuple(moments[::every].tolist()), tuple(counts[::every].tolist()), Style.STEPS)
    return Plot("Requests under way", "sent, and not over", _AXIS, "requests", (line,))


def _lag(records: Sequence[Record]) -> Plot:
    """The latest of each bin: what a mean would hide."""
    known = [(record.intended_s, record.lag_s * 1000) for record in records if record.lag_s is not None]
    known.sort()
    every = math.ceil(len(known) / _POINTS) or 1
    worst = [max(known[place : place + every], key=_second) for place in range(0, len(known), every)]
    line = Line("send lag", tuple(at for at, _ in worst), tuple(lag for _, lag in worst), Style.POINTS)
    caption = LATENCIES["send_lag"] + (f"; the latest of every {every}" if every > 1 else "")
    return Plot("Send lag", caption, _AXIS, "milliseconds", (line,))


def _second(pair: tuple[float, float]) -> float:
    return pair[1]


def _members(samples: Sequence[Sample]) -> list[Plot]:
    """Batches of the dense workers, and how full whatever keeps KV is."""
    dense = [sample for sample in samples if sample.role == "dense"]
    keeping = [sample for sample in samples if sample.blocks]
    batch = Plot(
        "Batch size",
        "sequences running on each dense worker, as its heartbeats tell",
        _AXIS,
        "sequences",
        _by_worker(dense, lambda sample: float(sample.running)),
    )
    pool = Plot(
        "KV pool occupancy",
        "share of each member's blocks that sequences hold or were promised; "
        "what is kept for reuse only counts as free",
        _AXIS,
        "share of blocks",
        _by_worker(keeping, lambda sample: sample.blocks_used / sample.blocks),
    )
    return [plot for plot in (batch, pool) if not plot.is_empty]


def _by_worker(samples: Sequence[Sample], value: Callable[[Sample], float]) -> tuple[Line, ...]:
    names = sorted({sample.worker_id for sample in samples})
    lines = []
    for name in names:
        own = [sample for sample in samples if sample.worker_id == name]
        lines.append(Line(name, tuple(s.at_s for s in own), tuple(value(s) for s in own), Style.STEPS))
    return tuple(lines)
