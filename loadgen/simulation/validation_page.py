"""`docs/validation.md`: run as a program, this module prints it; `make validation` writes it."""

from __future__ import annotations

from loadgen.simulation.validation import (
    CONFIGURATIONS,
    TRACES,
    both,
    computed_checks,
    gain,
    simulated_checks,
)


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
    return "\n".join([*lines, "", *capacities(), "", *_MISSING]) + "\n"


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


_MISSING = [
    "## Not checked here",
    "",
    "* The simulator against real runs of this project, and against emulation: neither is on this page.",
    "* Borrowing between instances (Infinite-LLM): the simulator can place so; no gain is compared.",
    "* Exchange between the devices of one dense worker is free here, which favours homogeneous shapes of",
    "  many devices.",
]


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201  a command's output
