"""The page of a sweep: the best point of each cluster, the cost frontier, curves over load, the landscape."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from loadgen.metrics import Summary, definition
from loadgen.report.content import Content, Section, Table, figures, headlines, text
from loadgen.report.drawing import COLOURS
from loadgen.report.landscape import landscape
from loadgen.report.plot import Line, Plot, Style
from loadgen.sweep.load import Course, LoadKind, Point, Standard

_COLUMNS = (
    ("output tokens/s", "output_throughput"),
    ("good requests/s", "request_goodput"),
    ("goodput share", "goodput_share"),
    ("TTFT p99, ms", "p99_ttft_ms"),
    ("TPOT, ms", "mean_tpot_ms"),
    ("$/Mtok", "usd_per_mtok"),
    ("tokens/$", "tokens_per_usd"),
)
_CURVES = (
    ("Output tokens per second", "output_throughput", "tokens/s"),
    ("Requests that keep the objectives", "goodput_share", "share of requests"),
    ("Requests that pile up", "piled_up_share", "share of requests"),
    ("Time to first token, p99", "p99_ttft_ms", "milliseconds"),
    ("Time per output token, mean", "mean_tpot_ms", "milliseconds"),
)
_X_LABELS = {LoadKind.RATE: "sessions begun per second", LoadKind.CONCURRENCY: "users"}
_STRETCH = 8.0


def ranked(courses: Sequence[Course]) -> list[Course]:
    """Those worth most first; equals as they came."""
    return sorted(courses, key=lambda course: -course.worth)


def sweep_page(courses: Sequence[Course], standard: Standard, *, is_search: bool) -> Content:
    """What `page.render` is given. Some point was measured."""
    points = [point for course in courses for point in course.points]
    assert points, "a sweep of nothing has no page"
    order = ranked(courses)
    shown = [course for course in order if course.best][:COLOURS]
    bests = [course.best for course in shown if course.best]
    head = points[0].summary
    key = standard.key(head)
    sections = (
        _setting(head, standard, key),
        Section("Best of each", _words(key), tables=(best_table(order),)),
        Section("Cost frontier", plots=(frontier(courses, standard),)),
        Section("Over load", plots=tuple(_curves(shown))),
        landscape(courses, key.replace("_", " "), is_search=is_search),
        Section("Every point", tables=(_all(points),)),
        _problems(courses),
    )
    return Content(
        title=f"{head['model_id']}, swept",
        subtitle=f"{len(points)} points on {len(courses)} clusters or settings · {head['date']}",
        warnings=tuple(filter(None, (*bests[0].summary["warnings"], bests[0].warning))) if bests else (),
        cards=tuple(headlines(f"{best.subject}, {best.load}", best.summary) for best in bests[:1]),
        sections=tuple(
            section
            for section in sections
            if section.words or section.tables or section.tiles or any(not p.is_empty for p in section.plots)
        ),
        columns=tuple(f"{best.subject}, {best.load}" for best in bests),
        figures=figures([best.line for best in bests]),
    )


def best_table(order: Sequence[Course]) -> Table:
    """A row for each cluster: the highest load it bore, and its best point."""
    names = tuple(name for name, _ in _COLUMNS)
    rows = tuple(
        (
            course.subject,
            str(course.highest.load) if course.highest else "none",
            str(course.best.load) if course.best else "none",
            *(text(course.best.summary.get(key) if course.best else None) for _, key in _COLUMNS),
        )
        for course in order
    )
    return Table(("cluster", "borne up to", "best at", *names), rows, wordy=(1, 2))


def frontier(courses: Sequence[Course], standard: Standard) -> Plot:
    """What a dollar (or, without prices, a second) brings at each latency; the line is the best that any
    point brings at no more than that latency.
    """
    known = [p for course in ranked(courses) for p in course.points if p.summary["mean_tpot_ms"] is not None]
    if not known:
        return Plot("Cost frontier", "", "", "", ())
    key = standard.brought(known[0].summary)
    names = list(dict.fromkeys(point.subject for point in known))[: COLOURS - 2]
    places: dict[str, list[tuple[float, float]]] = {}
    for point in known:
        name = point.subject if point.subject in names else "others"
        places.setdefault(name, []).append((point.summary["mean_tpot_ms"], point.summary[key] or 0.0))
    every = sorted(place for own in places.values() for place in own)
    tops = accumulate((y for _, y in every), max)
    best = Line("frontier", tuple(x for x, _ in every), tuple(tops), Style.STEPS)
    lines = [_line(name, own, Style.POINTS) for name, own in places.items()]
    return Plot(
        "What a dollar brings" if "usd" in key else "What a second brings",
        f"{definition(key)}; a point each, and the best at no more than each latency",
        "mean TPOT, milliseconds",
        key.replace("_usd", "_dollar").replace("_", " "),
        (best, *lines),
        is_log=_is_log([x for x, _ in every]),
    )


def _line(name: str, places: Sequence[tuple[float, float]], style: Style) -> Line:
    return Line(name, tuple(x for x, _ in places), tuple(y for _, y in places), style)


def _setting(head: Summary, standard: Standard, key: str) -> Section:
    scenario = {
        name: value
        for name, value in head["scenario"].items()
        if value not in (None, "", [], 0.0, ()) and name not in ("rate", "concurrency")
    }
    objectives = {name: f"{bound:g} ms" for name, bound in standard.objectives.bounds_ms}
    rows = {
        "Measured": f"{head['model_id']}, {head['backend']}, anabranch {head['version']}",
        "Load": text(scenario),
        "Workload": text(head["workload"]),
        "Objectives": f"{text(objectives)}, kept by {standard.attained:.0%}" if objectives else "none",
        "Judged by": f"{key}: {definition(key)}",
        "Notes": "; ".join(head["notes"]) or "none",
    }
    return Section("What was swept", tables=(Table((), tuple(rows.items()), wordy=(1,)),))


def _words(key: str) -> str:
    return (
        f"The point of each with the highest {key} of those whose load was borne, and the highest load borne."
    )


def _curves(shown: Sequence[Course]) -> list[Plot]:
    """The best clusters' figures over load; nothing where none was asked twice."""
    if not any(len(course.points) > 1 for course in shown):
        return []
    plots = []
    for title, key, unit in _CURVES:
        lines = []
        for course in shown:
            places = sorted(
                (p.load.value, p.summary[key]) for p in course.points if p.summary[key] is not None
            )
            if places:
                lines.append(_line(course.subject, places, Style.STRAIGHT))
        if lines:
            xs = [x for line in lines for x in line.xs]
            label = _X_LABELS[shown[0].points[0].load.kind]
            plots.append(Plot(title, definition(key), label, unit, tuple(lines), is_log=_is_log(xs)))
    return plots


def _all(points: Sequence[Point]) -> Table:
    names = tuple(name for name, _ in _COLUMNS)
    rows = tuple(
        (
            point.subject,
            str(point.load),
            f"no: {point.fault}" if point.fault else "yes",
            *(text(point.summary.get(key)) for _, key in _COLUMNS),
        )
        for point in points
    )
    return Table(("cluster", "load", "borne", *names), rows, wordy=(1, 2))


def _problems(courses: Sequence[Course]) -> Section:
    rows = tuple((course.subject, course.problem) for course in courses if course.problem)
    table = Table(("cluster", "why it was not measured to the end"), rows, wordy=(1,))
    return Section("Left out", tables=(table,) if rows else ())


def _is_log(xs: Sequence[float]) -> bool:
    return min(xs) > 0 and max(xs) > _STRETCH * min(xs)
