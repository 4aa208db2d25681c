"""`anabranch chaos`: seeds run one after the other, a line for each, and a report."""

from __future__ import annotations

import asyncio
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.errors import InvalidRequest

_KINDS = "kill,freeze,cut"


def chaos(
    seed: Annotated[int, typer.Option(help="The first seed: it decides requests, victims and moments.")] = 0,
    seeds: Annotated[int, typer.Option(help="How many seeds, one after the other.", min=1)] = 1,
    requests: Annotated[int, typer.Option(help="Requests of each run.", min=1)] = 200,
    load: Annotated[
        float, typer.Option(help="Share of what the fleet can serve, measured first.", min=0.01, max=1.0)
    ] = 0.25,
    faults: Annotated[int | None, typer.Option(help="No more faults than this in each run.", min=0)] = None,
    kinds: Annotated[
        str, typer.Option(help="Of kill, freeze, cut, separated by commas; lost capacity is always killed.")
    ] = _KINDS,
    lost_capacity: Annotated[
        bool, typer.Option("--lost-capacity", help="Lose whole roles for some seconds, each in turn.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the whole report into FILE.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep the processes' logs, in a folder per seed.")
    ] = None,
) -> None:
    """Kill, freeze and cut off processes of a small cluster under load, and compare every token.

    Two gateways, two dense and three attention workers on a tiny random model serve the same requests twice:
    undisturbed, and while a drawn process is lost again as soon as the fleet is whole. A request that
    ends in an error, hangs, or has another token fails the run; so does a block that stays held.

    Targets, such as how soon streams go on, are judged over all seeds, a line for each. One that is missed
    fails the command, too; on a machine that is busy, a target in seconds says more of that machine. Work of
    the idle class keeps the cores from halting meanwhile: a virtual one comes back when its host likes.

    With --lost-capacity every process of a role is killed and none is started for some seconds, each role in
    turn, and once all attention workers but one, which cannot hold what runs. Then requests may fail, with
    UNAVAILABLE, RESOURCE_EXHAUSTED or DEADLINE_EXCEEDED, but not have another token or hang; sent again when
    the fleet is whole they must end well.

    \b
    anabranch chaos --seed 7
    anabranch chaos --lost-capacity
    anabranch chaos --seeds 50 --json chaos.json
    """
    from anabranch.cli.bench.results_file import provenance
    from anabranch.cli.chaos.verdict import summary

    chosen = _kinds(kinds)
    console = Console()
    reports = []
    for number in range(seed, seed + seeds):
        settings = {
            "requests": requests, "load": load, "faults_most": faults, "kinds": chosen,
            "lost_capacity": lost_capacity,
        }  # fmt: skip
        reports.append(_one(number, settings, keep, console))
        if json_file is not None:
            told = provenance() | {"summary": summary(reports), "seeds": reports}
            json_file.write_text(json.dumps(told, indent=1) + "\n")
    whole = summary(reports)
    console.print(_losses_table(whole) if lost_capacity else _table(whole))
    for target in whole["targets"]:
        said = {True: "met", False: "missed", None: "not judged, too few"}[target["met"]]
        line = f"target {target['target']}: {said} ({target['found']})"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    is_missed = any(target["met"] is False for target in whole["targets"])
    raise typer.Exit(1 if whole["failures"] or is_missed else 0)


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(word.strip() for word in text.split(","))
    unknown = set(kinds) - set(_KINDS.split(","))
    if unknown:
        raise InvalidRequest(f"--kinds: {', '.join(sorted(unknown))} is none of {_KINDS}")
    return kinds


def _one(seed: int, settings: dict[str, Any], keep: Path | None, console: Console) -> dict[str, Any]:
    """Run one seed and print its line."""
    from anabranch.cli.bench.awake import awake
    from anabranch.cli.chaos.near_ties import NEAR_TIE, gap_at
    from anabranch.cli.chaos.run import Settings, run
    from anabranch.cli.chaos.verdict import verdict

    with awake(), tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        folder = Path(scratch)
        if keep is not None:
            folder = keep / f"seed-{seed}"
            folder.mkdir(parents=True)
        with console.status("") as status:
            tell = lambda doing: status.update(f"seed {seed}: {doing}")  # noqa: E731
            course = asyncio.run(run(Settings(seed, **settings), folder, tell))
            report = verdict(course, partial(gap_at, folder / "model"), NEAR_TIE)
    struck = len(report["faults"]) + len(report["losses"])
    line = f"seed {seed}: {report['requests']} requests, {struck} faults, {report['moves']} moves of cache"
    console.print(f"{line}, {len(report['failures'])} failures", highlight=False)
    for failure in report["failures"]:
        console.print(f"  {failure}", markup=False, highlight=False)
    for tie in report["near_ties"]:
        console.print(
            f"  near-tie: {tie['request']}, token {tie['index']}: {tie['gap']:.2g}", highlight=False
        )
    return report


def _table(whole: dict[str, Any]) -> Table:
    """Per role and kind: how often, how much longer than its own longest calm silence a stream waited that
    lost the process, and how soon after the fault it went on.
    """
    table = _headed(
        whole, "lost", "faults", "streams", "extra silence p50, s", "p95, s", "next token p50, s", "p95, s"
    )
    for name, extra in whole["extra_s"].items():
        count = whole["faults"].get(name) or sum(
            times for pair, times in whole["faults"].items() if pair.startswith(f"{name} ")
        )
        following = _percentiles(whole["next_token_s"][name])
        table.add_row(name, str(count), str(extra["streams"]), *_percentiles(extra), *following)
    return table


def _losses_table(whole: dict[str, Any]) -> Table:
    """Per loss: what became of the requests that were open in it, and how soon those that waited went on."""
    table = _headed(whole, "lost", "times", "open", "failed", "waited", "next token p50, s", "p95, s")
    for name, loss in whole["losses"].items():
        failed = ", ".join(f"{count} {status}" for status, count in sorted(loss["failed"].items())) or "0"
        counts = str(loss["times"]), str(loss["requests"]), failed, str(loss["waited"])
        table.add_row(name, *counts, *_percentiles(loss))
    return table


def _headed(whole: dict[str, Any], first: str, *others: str) -> Table:
    table = Table(
        title=f"{whole['requests']} requests, load {whole['load_share_most']:.0%} of capacity at most"
    )
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _percentiles(found: dict[str, Any]) -> tuple[str, ...]:
    return tuple("-" if found[key] is None else f"{found[key]:.2f}" for key in ("p50", "p95"))
