"""`anabranch loadgen report` and `compare`: pages of runs that are over."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from anabranch.cli.loadgen.options import PricesFile, Shape, bill
from anabranch.cli.loadgen.table import WIDTH, print_pair
from cluster.errors import InvalidRequest
from loadgen.comparison import named_apart
from loadgen.cost import Bill, priced
from loadgen.report.comparison_page import comparison_page, pairs_of, unlike
from loadgen.report.page import render
from loadgen.report.run_page import run_page
from loadgen.results import PAGE, read_run

Folder = Annotated[Path, typer.Argument(help="Folder of a run.", exists=True, file_okay=False)]


def report(folder: Folder, shape: Shape = "", prices: PricesFile = None) -> None:
    """Write FOLDER/report.html anew, from the run's lines: one file that needs nothing else.

    With a shape, the page shows what the run's tokens cost on it, whatever the run said itself.

    \b
    anabranch loadgen report loadgen-20250101-120000
    anabranch loadgen report loadgen-20250101-120000 --shape dense=1xh100,attention=2xh20 --prices mine.toml
    """
    print(f"written: {write_page(folder, bill(shape, prices))}")


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Two runs or more.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page.")] = Path("comparison.html"),
) -> None:
    """Put runs beside each other: each against the first, with what is only noise called so.

    Differences have intervals of 95 %, by bootstrap over requests (rates: over slices of time).

    \b
    anabranch loadgen compare before after
    anabranch loadgen compare one-worker two-workers four-workers --out workers.html
    """
    if len(folders) < 2:
        raise InvalidRequest("give two runs or more to compare")
    runs = named_apart(folders, [read_run(folder) for folder in folders])
    if empty := [run.name for run in runs if not run.summaries]:
        raise InvalidRequest(f"nothing was measured in {', '.join(empty)}")
    pairs = pairs_of(runs)
    console = Console()
    console.width = max(console.width, WIDTH)
    for pair in pairs:
        print_pair(console, pair)
    for words in unlike(runs):
        console.print(f"warning: {words}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    out.write_text(render(comparison_page(runs, pairs)), encoding="utf-8")
    console.print(f"\nwritten: {out}", highlight=False, markup=False)


def write_page(folder: Path, paid: Bill | None = None) -> Path:
    """The page of a run, beside its lines. Raises InvalidRequest where there is no run to read."""
    run = read_run(folder)
    if paid is not None:
        run = dataclasses.replace(run, summaries=tuple(priced(run.records, run.summaries, paid)))
    page = folder / PAGE
    page.write_text(render(run_page(run)), encoding="utf-8")
    return page
