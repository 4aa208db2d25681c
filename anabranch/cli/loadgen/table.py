"""A stage's summary as tables for people."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from loadgen.comparison import StagePair
from loadgen.cost import PARTS
from loadgen.metrics import PERCENTILES, ROLES, Summary
from loadgen.report.comparison_page import interval

WIDTH = 100
"""A table narrower than this would cut its figures; a narrow terminal wraps it."""

_LATENCIES = (
    ("TTFT", "ttft"),
    ("TPOT", "tpot"),
    ("ITL", "itl"),
    ("end to end", "e2el"),
    ("send lag", "send_lag"),
)
_STATISTICS = ("mean", "median", *(f"p{percent}" for percent in PERCENTILES), "max")


def print_summary(console: Console, summary: Summary) -> None:
    """Counts and rates, latencies, the server's times by role, warnings."""
    console.print()
    console.print(f"{summary['stage']}", style="bold", highlight=False)
    for line in _lines(summary):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(_latencies(summary))
    if summary["mean_decode_ms"] is not None:
        parts = ", ".join(f"{name} {summary[f'mean_{name}_ms']:,.1f}" for name in ROLES)
        console.print(f"  server, mean ms a request: {parts}", highlight=False, soft_wrap=True)
    for line in _costs(summary):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    for warning in summary["warnings"]:
        console.print(f"  warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def print_pair(console: Console, pair: StagePair) -> None:
    """Figures of two stages, with what their difference is worth."""
    console.print()
    console.print(f"{pair.base}  against  {pair.other}", style="bold", highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=True)
    table.add_column("figure")
    for title in ("first", "other", "difference (95 %)"):
        table.add_column(title, justify="right")
    table.add_column("verdict")
    for each in pair.differences:
        figures = ("-" if value is None else f"{value:,.2f}" for value in (each.base, each.other))
        table.add_row(each.key, *figures, interval(each), each.verdict)
    console.print(table)


def _lines(summary: Summary) -> list[str]:
    counts = ", ".join(
        f"{name} {summary[name]:,}" for name in ("completed", "failed", "interrupted", "unsent")
    )
    reasons = "".join(f", {count} x {reason}" for reason, count in summary["errors"].items())
    lines = [
        f"{counts} of {summary['planned']:,} planned{reasons}",
        f"{summary['duration']:.1f} s: {_number(summary['request_throughput'])} requests/s, "
        f"{_number(summary['output_throughput'])} output tokens/s, "
        f"{_number(summary['total_token_throughput'])} tokens/s in all",
    ]
    if summary["request_goodput"] is not None:
        lines.append(f"goodput {_number(summary['request_goodput'])} requests/s")
    if summary["asked_rate"] is not None and summary["achieved_rate"] is not None:
        lines.append(
            f"sent {summary['achieved_rate']:.3f} of {summary['asked_rate']:.3f} sessions/s drawn "
            f"({summary['achieved_over_asked']:.1%}); asked for: {_number(summary['request_rate'])}"
        )
    if summary["littles_law_residual"] is not None:
        lines.append(
            f"under way {summary['mean_concurrent_requests']:.2f} on average, "
            f"{summary['max_concurrent_requests']} at most; Little's law is off by "
            f"{summary['littles_law_residual']:+.1%}"
        )
    return [*lines, f"busiest sender used {summary['client_cpu_share']:.0%} of a core"]


def _costs(summary: Summary) -> list[str]:
    """Nothing where no shape was given."""
    if summary.get("usd_per_mtok") is None:
        return []
    lines = [
        f"cost of {summary['shape']}: ${summary['usd_per_mtok']:,.4g} a million tokens, "
        f"{summary['tokens_per_usd']:,.0f} tokens a dollar; "
        f"input ${_money(summary['usd_per_mtok_input'])}, output ${_money(summary['usd_per_mtok_output'])}"
    ]
    if summary["used_usd_per_mtok"] is not None:
        parts = ", ".join(f"{part} ${_money(summary[f'usd_per_mtok_{part}'])}" for part in PARTS)
        lines.append(f"  of which {parts}; without idle ${_money(summary['used_usd_per_mtok'])}")
    if summary["good_tokens_per_usd"] is not None:
        lines.append(
            f"  at the objectives ${_money(summary['usd_per_mtok_at_slo'])}, "
            f"{summary['good_tokens_per_usd']:,.0f} tokens a dollar"
        )
    if summary["joules_per_output_token"] is not None:
        lines.append(
            f"  {summary['joules_per_output_token']:,.4g} J an output token, "
            f"at {summary['power_w']:,.0f} W of rated power (not measured)"
        )
    return lines


def _money(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def _latencies(summary: Summary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=True)
    table.add_column("ms")
    for statistic in _STATISTICS:
        table.add_column(statistic, justify="right")
    for title, name in _LATENCIES:
        figures = (summary[f"{statistic}_{name}_ms"] for statistic in _STATISTICS)
        table.add_row(title, *("-" if value is None else f"{value:,.2f}" for value in figures))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"
