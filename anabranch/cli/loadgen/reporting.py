"""`anabranch loadgen report`: pages of runs that are over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loadgen.report.page import render
from loadgen.report.run_page import run_page
from loadgen.results import PAGE, read_run

Folder = Annotated[Path, typer.Argument(help="Folder of a run.", exists=True, file_okay=False)]


def report(folder: Folder) -> None:
    """Write FOLDER/report.html anew, from the run's lines: one file that needs nothing else.

    \b
    anabranch loadgen report loadgen-20250101-120000
    """
    print(f"written: {write_page(folder)}")


def write_page(folder: Path) -> Path:
    """The page of a run, beside its lines. Raises InvalidRequest where there is no run to read."""
    page = folder / PAGE
    page.write_text(render(run_page(read_run(folder))), encoding="utf-8")
    return page
