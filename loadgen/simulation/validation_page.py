"""`docs/validation.md`: run as a program, this module prints it; `make validation` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from loadgen.simulation.checks import FIGURES, WITHIN, beyond, comparisons
from loadgen.simulation.validation import (
    CONFIGURATIONS,
    TRACES,
    both,
    computed_checks,
    gain,
    simulated_checks,
)

_BENCH = Path(__file__).parents[2] / "bench"
_REAL_RUNS, _STUDY = _BENCH / "simulator.json", _BENCH / "study.json"
_BESIDE = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms")
_BORROWING = "Borrowing"
"""The part of the example study."""


def page() -> str:
    """`docs/validation.md`."""
    lines = [
        "# The model beside what was published",
        "",
        "Written by `make validation`. *Agrees* means that our figure is where the source says, within the",
        "rounding or the bound that `loadgen/simulation/validation.py` names; nothing was fitted.",
        "Hardware and prices are those of `cluster/hardware.toml`; devices reach their peaks (rooflines).",
        "",
        "| claim | source | stated | ours | verdict |",
        "|---|---|---|---|---|",
    ]
    for check in (*computed_checks(), *simulated_checks()):
        verdict = "agrees" if check.agrees else "does not agree"
        because = f": {check.because}" if check.because else ""
        lines.append(
            f"| {check.claim} | {check.source} | {check.stated} | {check.ours} | {verdict}{because} |"
        )
    return "\n".join([*lines, "", *capacities(), "", *real_runs(), "", *emulations(), "", *_MISSING]) + "\n"


def capacities() -> list[str]:
    """The page's table of what each configuration holds and gives."""
    lines = [
        "## Capacity of every configuration",
        "",
        "Batch and output tokens per second at saturation, all memory used, prompts computed elsewhere; the",
        "gain of the split shape, and what it is with prompts on the same cluster.",
        "",
        "| model | trace | split: batch, tokens/s | homogeneous: batch, tokens/s | gain | with prompts |",
        "|---|---|---|---|---|---|",
    ]
    for model in CONFIGURATIONS:
        for trace in TRACES:
            split, alone = both(model, trace)
            lines.append(
                f"| {model} | {trace} | {split.batch:.0f}, {split.tokens_per_s:,.0f} | "
                f"{alone.batch:.0f}, {alone.tokens_per_s:,.0f} | {gain(model, trace):+.1%} | "
                f"{gain(model, trace, elsewhere=False):+.1%} |"
            )
    return lines


def real_runs(path: Path = _REAL_RUNS) -> list[str]:
    """The page's table of real runs beside the simulator, from what `anabranch loadgen check` wrote."""
    told = json.loads(path.read_text("utf-8"))
    machine, compared = told["machine"], comparisons(told)
    lines = [
        "## The simulator beside real runs",
        "",
        f"{told['model']['name']} on {machine['cores']} cores of {machine['cpu']}, one for each role;",
        "both dense workers of `2x1` have one. Measured by `anabranch loadgen check`: the real figure, and",
        "how far the prediction is off. The simulator knows dense work, attention and lanes, each measured",
        "by itself while the cluster was up and idle, before the run and behind it, and, from two short",
        "loads before both, what processor time telling users of a token takes. The rate of open loops is a",
        "share of what the simulator takes for the most such a cluster can do. `1x1`: one dense worker, one",
        "attention worker; `8 x 1024`: users, and tokens of their requests. The last columns: the share of",
        "the machine that was taken by what has nothing to do with the run, and how far the machine's speed",
        "moved from one calibration to the other. Runs with more than 5% of the one or 10% of the other are",
        "refused: they say nothing.",
        "",
        "| run | tokens/s | TTFT, mean (ms) | p95 | TPOT, mean (ms) | p95 | others | moved |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, case in told["cases"].items():
        figures = [compared[name][figure] for figure in FIGURES]
        cells = " | ".join(f"{values['real']:,.1f} ({values['off']:+.0%})" for values in figures)
        lines.append(f"| {name} | {cells} | {case['others_share']:.0%} | {case['moved']:.0%} |")
    off = beyond(compared)
    over = ", ".join(f"{name} of {case}" for case, name, _ in off) or "none"
    return [*lines, "", f"Off by more than {WITHIN:.0%}: {over}.", *_BECAUSE]


_BECAUSE = [
    "",
    "* `1x1, Azure-Conv at 0.9`: near saturation a little of speed is much of the time that requests",
    "  stand beside each other's prompts. With all parts a twentieth slower, throughput, time to the",
    "  first token and the p95 of the time per token are within 6%, and its mean within 13%.",
    "* `2x1`: two dense workers on one core take somewhat more of it than the parts of both.",
]
"""The causes of figures that are further off, and what is missing."""


def emulations(path: Path = _STUDY) -> list[str]:
    """The page's table of emulated clusters beside the simulator, from what `make study` wrote."""
    runs = json.loads(path.read_text("utf-8"))["runs"]
    means = {
        (run["part"], run["case"], run["way"]): {
            key: fmean(values) for key, values in run["figures"].items() if values
        }
        for run in runs
    }
    lines = [
        "## The simulator beside emulations",
        "",
        "Processes that keep the time of the devices named (`anabranch up --emulate`), from the example",
        "study (`make study`): the emulated figure, and how far the simulated one is off. An emulation's",
        "scheduler, lanes and placement are the real ones; the simulator's lanes and arenas are modelled.",
        "",
        "| part | case | tokens/s | TTFT, mean (ms) | TPOT, mean (ms) |",
        "|---|---|--:|--:|--:|",
    ]
    for (part, case, way), figures in means.items():
        if way == "emulated":
            beside = means[part, case, "simulated"]
            cells = " | ".join(
                f"{figures[key]:,.1f} ({beside[key] / figures[key] - 1:+.0%})" for key in _BESIDE
            )
            lines.append(f"| {part} | {case} | {cells} |")
    gains = {
        way: means[_BORROWING, "borrowing", way][_BESIDE[0]] / means[_BORROWING, "separate", way][_BESIDE[0]]
        for way in ("emulated", "simulated")
    }
    return [
        *lines,
        "",
        f"Borrowing brings {gains['emulated']:.2f} x the tokens per second, simulated "
        f"{gains['simulated']:.2f} x;",
        "Infinite-LLM (arXiv 2401.02669) states 1.03 x to 2.4 x in its first version.",
        *_EMULATED_BECAUSE,
    ]


_EMULATED_BECAUSE = [
    "",
    "* Time to the first token while borrowing is off by some milliseconds: nine users begin at",
    "  once, and which of them the first steps take is chance; the median of what they ask later is",
    "  24 ms in both.",
]
"""Why the two differ, as far as it is known."""

_MISSING = [
    "## Not checked here",
    "",
    "* Exchange between the devices of one dense worker is free here, which favours homogeneous shapes of",
    "  many devices.",
]


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201  a command's output
