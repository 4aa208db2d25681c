"""The page of a study: its cases with intervals, what each gains, and how far simulation is off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loadgen.report.content import Content, Section, Table, figures, text
from loadgen.report.drawing import COLOURS
from loadgen.report.plot import Line, Plot, Style
from loadgen.study.figures import COMPARED, FIGURES, WITHIN, Estimate, Runs, StudyResults
from loadgen.study.study import Part

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
    columns = [f"{runs.case}, {runs.way}" for runs in results.runs]
    return Content(
        title="A study of clusters",
        subtitle=f"{len(results.runs)} cases in their ways, {len(seeds)} seeds each · {told['date']}",
        warnings=tuple(f"{runs.case}, {runs.way}: {note}" for runs in results.runs for note in runs.notes),
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
        plots=tuple(plot for plot in (_frontier(own),) if not plot.is_empty),
    )


def _frontier(own: Sequence[Runs]) -> Plot:
    """Each case and way by what a user waits for a token and what a million of them cost."""
    lines = []
    for runs in own[:COLOURS]:
        xs, ys = runs.values("mean_tpot_ms"), runs.values("usd_per_mtok")
        if xs and ys:
            lines.append(Line(f"{runs.case}, {runs.way}", tuple(xs), tuple(ys), Style.POINTS))
    return Plot(
        "Cost frontier",
        "a point for each seed: lower is cheaper, further left is faster",
        "mean TPOT, milliseconds",
        "$ / million tokens",
        tuple(lines),
    )


def _agreement(results: StudyResults) -> Section:
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for runs, key, off in results.agreements():
        row = rows.setdefault((runs.case, str(runs.way)), dict.fromkeys(COMPARED, ""))
        row[key] = f"{off:+.1%}"
    head = ("case", "beside", *(_HEADS[key] for key in COMPARED))
    table = Table(head, tuple((*names, *row.values()) for names, row in rows.items()), wordy=(1,))
    words = (
        "How far simulated figures are off those measured. Beside an emulation, whose processes keep the "
        f"time of the same devices, {WITHIN:.0%} is the aim: what differs is what the simulator leaves out. "
        "Beside real runs it knows a calibration of this machine by parts."
    )
    return Section("Simulated beside measured", words if rows else "", tables=(table,) if rows else ())


def _words(seeds: int) -> str:
    return (
        f"Figures are means over {seeds} seeds of the load, ± half of their 95 % interval (Student's t). "
        "Gains are taken seed by seed. Joules are of the devices' rated power, not measured."
    )


def _setting(told: Mapping[str, Any], seeds: Sequence[int]) -> Table:
    rows = {
        "Commit": told["commit"] or "not a checkout",
        "Command": told["command"],
        "Machine": text(told["machine"]),
        "Seeds": ", ".join(map(str, seeds)),
    }
    return Table((), tuple(rows.items()), wordy=(1,))
