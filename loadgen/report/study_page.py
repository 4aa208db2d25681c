"""The page of a study: its cases with intervals, what each gains, and how far simulation is off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loadgen.report.content import Content, Section, Table, figures, text
from loadgen.report.drawing import COLOURS
from loadgen.report.plot import Line, Plot, Style
from loadgen.study.figures import COMPARED, FIGURES, WITHIN, Estimate, Runs, StudyResults
from loadgen.study.study import Part, Way

_HEADS = {
    "output_throughput": "output tokens/s",
    "mean_ttft_ms": "TTFT, ms",
    "mean_tpot_ms": "TPOT, ms",
    "usd_per_mtok": "$/Mtok",
    "joules_per_output_token": "J/output token",
}


def study_page(results: StudyResults, told: Mapping[str, Any]) -> Content:
    """What `page.render` is given. `told`: commit, date and machine of the study."""
    seeds = results.study.seeds
    sections = [
        Section("What was done", _words(len(seeds)), tables=(_setting(told, seeds),)),
        *(_part(part, results) for part in results.study.part),
        _agreement(results),
    ]
    columns = [f"{runs}, seed {seeds[0]}" for runs in results.runs]
    return Content(
        title="A study of clusters",
        subtitle=f"{len(results.runs)} cases in their ways, {len(seeds)} seeds each · {told['date']}",
        warnings=tuple(f"{runs}: {doubt}" for runs in results.runs for doubt in runs.doubts),
        cards=(),
        sections=tuple(sections),
        columns=tuple(columns),
        figures=figures([runs.summaries[0] for runs in results.runs]),
    )


def interval(estimate: Estimate | None) -> str:
    """A mean and its half width."""
    if estimate is None:
        return text(None)
    half = "" if estimate.half_width is None else f" ± {text(estimate.half_width)}"
    return text(estimate.mean) + half


def gain(estimate: Estimate | None) -> str:
    """A relative difference and its half width."""
    if estimate is None:
        return text(None)
    half = "" if estimate.half_width is None else f" ± {estimate.half_width:.1%}"
    return f"{estimate.mean:+.1%}{half}"


def part_table(part: Part, results: StudyResults) -> Table:
    """A row for each case and way."""
    rows = tuple(
        (
            runs.case,
            str(runs.way),
            *(interval(runs.estimate(key)) for key in FIGURES),
            gain(results.gain(runs)),
        )
        for runs in results.runs
        if runs.part == part.title
    )
    head = ("case", "way", *(_HEADS[key] for key in FIGURES), f"tokens/s over {part.case[0].name}")
    return Table(head, rows, wordy=(1,))


def _part(part: Part, results: StudyResults) -> Section:
    own = [runs for runs in results.runs if runs.part == part.title]
    return Section(
        part.title,
        part.words,
        tables=(part_table(part, results),) if own else (),
        plots=tuple(plot for way in part.ways if not (plot := _frontier(own, way)).is_empty),
    )


def _frontier(own: Sequence[Runs], way: Way) -> Plot:
    """Each case by what a user waits for a token and what a million of them cost; cases beyond the colours
    there are share one.
    """
    places: dict[str, list[tuple[float, float]]] = {}
    for runs in own:
        if runs.way is way:
            name = runs.case if len(places) < COLOURS - 1 else "others"
            pairs = zip(runs.values("mean_tpot_ms"), runs.values("usd_per_mtok"), strict=False)
            places.setdefault(name, []).extend(pairs)
    lines = [
        Line(name, tuple(x for x, _ in found), tuple(y for _, y in found), Style.POINTS)
        for name, found in places.items()
    ]
    return Plot(
        f"Cost frontier, {way}",
        "a point for each seed: lower is cheaper, further left is faster",
        "mean TPOT, milliseconds",
        "$ / million tokens",
        tuple(lines),
    )


def _agreement(results: StudyResults) -> Section:
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for runs, key, off in results.agreements():
        row = rows.setdefault((runs.part, runs.case, str(runs.way)), dict.fromkeys(COMPARED, ""))
        row[key] = f"{off:+.1%}"
    head = ("part", "case", "beside", *(_HEADS[key] for key in COMPARED))
    table = Table(head, tuple((*names, *row.values()) for names, row in rows.items()), wordy=(1, 2))
    far = ", ".join(f"{_HEADS[key]} of {runs} {off:+.1%}" for runs, key, off in results.beyond)
    words = (
        f"How far simulated figures are off those measured; {WITHIN:.0%} is the aim. Beside an emulation, "
        "whose processes keep the time of the same devices, what differs is what the simulator leaves out. "
        f"Beside real runs it knows a calibration of this machine by parts. Further off: {far or 'none'}."
    )
    return Section("Simulated beside measured", words if rows else "", tables=(table,) if rows else ())


def _words(seeds: int) -> str:
    return (
        f"Figures are means over {seeds} seeds of the load, ± half of their 95 % interval (Student's t). "
        "Gains are taken seed by seed. Where all lengths are fixed, seeds change nothing, and intervals are "
        "of what the machine does. Joules are of the devices' rated power, not measured. In real runs each "
        "role is priced and rated as a node of its own, though roles share this machine. The last table is "
        "of the first seed."
    )


def _setting(told: Mapping[str, Any], seeds: Sequence[int]) -> Table:
    rows = {
        "Commit": told["commit"] or "not a checkout",
        "Command": told["command"],
        "Machine": text(told["machine"]),
        "Seeds": ", ".join(map(str, seeds)),
    }
    return Table((), tuple(rows.items()), wordy=(1,))
