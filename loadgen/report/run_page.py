"""The page of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from loadgen.cost import PARTS
from loadgen.members import Sample
from loadgen.metrics import COSTS, ROLES, Summary
from loadgen.records import Outcome, Record
from loadgen.report.content import Bar, Content, Part, Section, Table, figures, headlines, text
from loadgen.report.plot import Line, Plot, Style
from loadgen.report.series import distributions, latencies, over_time
from loadgen.results import Run

_LATENCIES = (
    ("TTFT", "ttft"),
    ("TPOT", "tpot"),
    ("ITL", "itl"),
    ("End to end", "e2el"),
    ("Send lag", "send_lag"),
)
_STATISTICS = ("mean", "median", "std", "p90", "p95", "p99", "max")


def run_page(run: Run) -> Content:
    """What `page.render` is given for a run; stages of a ladder stand beside each other."""
    stages = [summary["stage"] for summary in run.summaries]
    head = run.summaries[0] if run.summaries else {}
    samples = [(stage, latencies(run.records, stage)) for stage in stages]
    return Content(
        title=f"{head.get('model_id', 'A run')} under load",
        subtitle=f"{run.name} · {head.get('date', 'nothing was measured')}",
        warnings=tuple(
            warning if len(stages) == 1 else f"{summary['stage']}: {warning}"
            for summary in run.summaries
            for warning in summary["warnings"]
        ),
        cards=tuple(headlines(summary["stage"], summary) for summary in run.summaries),
        sections=tuple(
            section
            for section in (
                _setting(head, run.samples),
                Section(
                    "Latencies", tables=_latency_tables(run.summaries), plots=tuple(distributions(samples))
                ),
                Section("Over time", plots=tuple(over_time(run))),
                _cost(run.summaries),
                _by_role(run.summaries),
                _failures(run.records),
            )
            if section.bars or section.tables or section.plots or section.words
        ),
        columns=tuple(stages),
        figures=figures(run.summaries),
    )


def _setting(head: Mapping[str, Any], samples: Sequence[Sample]) -> Section:
    """What was run, and on what; options that were left alone are not listed."""
    if not head:
        return Section("What was run")
    scenario = {key: value for key, value in head["scenario"].items() if value not in (None, "", [], 0.0)}
    rows = {
        "Endpoint": f"{head['endpoint']} ({head['backend']})",
        "Cluster": _cluster(samples),
        "Load generator": f"anabranch {head['version']}, {head['senders']} senders on {head['client']}",
        "Load": text(scenario),
        "Workload": text(head["workload"]),
        "Objectives": text({key: f"{bound:g} ms" for key, bound in head["objectives_ms"].items()}),
        "Notes": "; ".join(head["notes"]) or "none",
    }
    return Section("What was run", tables=(Table((), tuple(rows.items()), wordy=(1,)),))


def _cluster(samples: Sequence[Sample]) -> str:
    """Who was seen during the run."""
    if not samples:
        return "it told nothing of its members"
    roles = Counter(role for _, role in {(sample.worker_id, sample.role) for sample in samples})
    hosts = sorted({sample.host for sample in samples})
    return ", ".join(f"{count} {role}" for role, count in sorted(roles.items())) + f" on {', '.join(hosts)}"


def _latency_tables(summaries: Sequence[Summary]) -> tuple[Table, ...]:
    """Milliseconds; where there are several stages, each row names its own."""
    rows = [
        (
            name if len(summaries) == 1 else f"{name}, {summary['stage']}",
            *(text(summary[f"{statistic}_{key}_ms"]) for statistic in _STATISTICS),
        )
        for name, key in _LATENCIES
        for summary in summaries
    ]
    return (Table(("milliseconds", *_STATISTICS), tuple(rows)),) if rows else ()


def _cost(summaries: Sequence[Summary]) -> Section:
    """Only where a shape was given; the frontier needs stages to compare."""
    known = [summary for summary in summaries if summary.get("usd_per_mtok") is not None]
    if not known:
        return Section("Cost")
    bars = tuple(_cost_bar(summary) for summary in known if summary["usd_per_mtok_idle"] is not None)
    rows = tuple((key.replace("_", " "), *(text(summary.get(key)) for summary in known)) for key in COSTS)
    prices = "; ".join(f"{kind}: {told}" for kind, told in known[0]["prices"].items())
    points = tuple(
        Line(s["stage"], (s["mean_tpot_ms"],), (s["usd_per_mtok"],), Style.POINTS)
        for s in known
        if s["mean_tpot_ms"] is not None
    )
    frontier = Plot(
        "Cost frontier",
        "a stage each: what a million tokens cost, and what a user waits for each",
        "mean TPOT, milliseconds",
        "$ / million tokens",
        points,
    )
    return Section(
        "Cost",
        f"{known[0]['shape']} · {prices} · power is rated, not measured",
        bars,
        (Table(("dollars and energy", *(summary["stage"] for summary in known)), rows),),
        (frontier,) if len(points) > 1 else (),
    )


def _cost_bar(summary: Summary) -> Bar:
    whole = summary["usd_per_mtok"]
    values = {part: summary[f"usd_per_mtok_{part}"] for part in PARTS}
    parts = tuple(Part(name, value / whole, f"${text(value)}") for name, value in values.items())
    return Bar(f"${text(whole)} a million tokens, {summary['stage']}", parts)


def _by_role(summaries: Sequence[Summary]) -> Section:
    told = [summary for summary in summaries if summary["mean_decode_ms"] is not None]
    rows = tuple(
        (meaning[0].upper() + meaning[1:], *(text(summary[f"mean_{name}_ms"]) for summary in told))
        for name, meaning in ROLES.items()
    )
    if not told:
        return Section("By role")
    head = ("mean milliseconds of a request", *(summary["stage"] for summary in told))
    words = "The server's own account. Queue, prefill and decode follow each other; the others overlap."
    return Section("By role", words, bars=tuple(map(_course, told)), tables=(Table(head, rows),))


def _course(summary: Summary) -> Bar:
    means = {name: summary[f"mean_{name}_ms"] for name in ("queue", "prefill", "decode")}
    whole = sum(means.values()) or 1.0
    parts = tuple(Part(name, mean / whole, f"{text(mean)} ms") for name, mean in means.items())
    return Bar(f"A mean request, {summary['stage']}", parts)


def _failures(records: Sequence[Record]) -> Section:
    failed = [record for record in records if record.outcome is Outcome.FAILED]
    if not failed:
        return Section("Failures", "No request failed.")
    counts = Counter(record.error.partition(":")[0] for record in failed)
    said = {record.error.partition(":")[0]: record.error for record in failed}
    rows = tuple((reason, f"{count:,}", said[reason]) for reason, count in counts.most_common())
    words = f"{len(failed):,} of {len(records):,} requests, those of the warm-up included."
    return Section(
        "Failures", words, tables=(Table(("reason", "requests", "for example"), rows, wordy=(2,)),)
    )
