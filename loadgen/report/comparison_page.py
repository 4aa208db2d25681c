"""The page of runs beside each other; every other one against the first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from loadgen.comparison import Difference, StagePair, apart, compare, settings
from loadgen.report.content import Content, Section, Table, figures, headlines, text
from loadgen.report.plot import Line, Plot
from loadgen.report.series import distributions, latencies, over_time
from loadgen.results import Run

_TOLD = ("Requests per second", "Output tokens per second", "Requests under way")
_WORDS = (
    "Intervals are 95 %, by bootstrap: of latencies over requests, of rates over slices of time. Requests of "
    "a run wait for each other, so intervals are rather too narrow: repeat with other seeds before a small "
    "difference is believed."
)


def pairs_of(runs: Sequence[Run]) -> list[StagePair]:
    """The first run against each other one. Raises InvalidRequest where two have no stage in common."""
    return [pair for other in runs[1:] for pair in compare(runs[0], other)]


def unlike(runs: Sequence[Run]) -> list[str]:
    """A line for each run that was asked something else than the first, or ran on something else."""
    return [words for other in runs[1:] if (words := apart(runs[0], other))]


def comparison_page(runs: Sequence[Run], pairs: Sequence[StagePair]) -> Content:
    """What `page.render` is given."""
    stages = [(run, summary) for run in runs for summary in run.summaries]
    names = [f"{run.name}, {summary['stage']}" for run, summary in stages]
    samples = [
        (name, latencies(run.records, summary["stage"]))
        for name, (run, summary) in zip(names, stages, strict=True)
    ]
    return Content(
        title=" and ".join(run.name for run in runs),
        subtitle=" · ".join(f"{run.name}: {run.summaries[0]['date']}" for run in runs),
        warnings=(
            *unlike(runs),
            *(
                f"{name}: {warning}"
                for name, (_, summary) in zip(names, stages, strict=True)
                for warning in summary["warnings"]
            ),
        ),
        cards=tuple(headlines(name, summary) for name, (_, summary) in zip(names, stages, strict=True)),
        sections=(
            Section("What was run", tables=(_settings(runs),)),
            Section("Differences", _WORDS, tables=tuple(map(_table, pairs))),
            Section("Latencies", plots=tuple(distributions(samples))),
            Section("Over time", plots=tuple(_beside(runs))),
        ),
        columns=tuple(names),
        figures=figures([summary for _, summary in stages]),
    )


def interval(difference: Difference) -> str:
    """The relative difference with its bounds."""
    if difference.relative is None:
        return "–"
    if difference.low is None or difference.high is None:
        return f"{difference.relative:+.1%}"
    return f"{difference.relative:+.1%} ({difference.low:+.1%} to {difference.high:+.1%})"


def _table(pair: StagePair) -> Table:
    rows = tuple(
        (each.key, text(each.base), text(each.other), interval(each), each.verdict)
        for each in pair.differences
    )
    return Table(("", pair.base, pair.other, "difference", "verdict"), rows, wordy=(4,))


def _settings(runs: Sequence[Run]) -> Table:
    """A column for each run; options that were left alone in all of them are not listed."""
    each = [settings(run) for run in runs]
    names = dict.fromkeys(name for own in each for name in own)
    rows = []
    for name in names:
        values = [own.get(name) for own in each]
        if any(value not in (None, "", [], 0.0, {}) for value in values):
            differs = "" if all(value == values[0] for value in values) else "differs"
            rows.append((name.replace("_", " "), *map(text, values), differs))
    return Table(("", *(run.name for run in runs), ""), tuple(rows), wordy=tuple(range(1, len(runs) + 2)))


def _beside(runs: Sequence[Run]) -> list[Plot]:
    """Each run's first line of the plots over time, in one picture."""
    whole = {run.name: {plot.title: plot for plot in over_time(run)} for run in runs}
    plots = []
    for title in _TOLD:
        own = [(name, drawn[title]) for name, drawn in whole.items() if title in drawn]
        lines = tuple(_named(name, plot) for name, plot in own)
        if own:
            span_s = (0.0, max(plot.x_span[1] for _, plot in own if plot.x_span))
            plots.append(dataclasses.replace(own[0][1], lines=lines, marks=(), x_span=span_s))
    return plots


def _named(name: str, plot: Plot) -> Line:
    """What came of it: completed requests rather than those due."""
    line = next((line for line in plot.lines if line.name == "completed"), plot.lines[0])
    return dataclasses.replace(line, name=name)
