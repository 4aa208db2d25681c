"""`anabranch loadgen report`: pages of runs that are over."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.loadgen.options import PricesFile, Shape, bill
from loadgen.cost import Bill, priced
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


def write_page(folder: Path, paid: Bill | None = None) -> Path:
    """The page of a run, beside its lines. Raises InvalidRequest where there is no run to read."""
    run = read_run(folder)
    if paid is not None:
        run = dataclasses.replace(run, summaries=tuple(priced(run.records, run.summaries, paid)))
    page = folder / PAGE
    page.write_text(render(run_page(run)), encoding="utf-8")
    return page
