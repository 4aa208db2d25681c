"""`anabranch loadgen study`."""

from __future__ import annotations

import contextlib
import json
import shutil
import tarfile
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from anabranch.cli import model as model_store
from anabranch.cli.generate import INTERRUPTED_STATUS
from anabranch.cli.loadgen.recording import Recorder, stopping
from anabranch.cli.loadgen.study.ways import Opened, Ways
from cluster.errors import InvalidRequest
from loadgen.pool import StopSwitch
from loadgen.report.page import render
from loadgen.report.study_page import part_table, study_page
from loadgen.results import PAGE
from loadgen.simulation.calibration import Calibration
from loadgen.study.figures import WITHIN, Runs, StudyResults
from loadgen.study.study import Case, Part, Study, Way, read

_WIDTH = 150
RESULTS = "results.json"


def study(
    file: Annotated[
        Path | None,
        typer.Argument(help="The study. Default: the example, which takes half an hour.", dir_okay=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A new folder for the results.")] = None,
    only: Annotated[str, typer.Option(help="Parts whose titles begin so. Default: all.")] = "",
    show: Annotated[bool, typer.Option(help="Print the example's file, to change it, and end.")] = False,
) -> None:
    """Measure a study's clusters in each way its file names: real, emulated, simulated; several seeds each.

    Every run is a folder of OUT, as of `run`; OUT/results.json has all figures with commit and machine,
    OUT/report.html shows them with intervals, OUT.tar.gz holds it all. Real clusters take all cores: nothing
    else should run meanwhile.

    \b
    anabranch loadgen study --out study                      # the example
    anabranch loadgen study --show > mine.toml; anabranch loadgen study mine.toml
    anabranch loadgen study --only Borrowing
    """
    if show:
        print(_example().read_text("utf-8"), end="")
        return
    path = file or _example()
    asked = read(path)
    parts = tuple(part for part in asked.part if part.title.startswith(only))
    if not parts:
        titles = ", ".join(part.title for part in asked.part)
        raise InvalidRequest(f"no part's title begins with {only!r}: {titles}")
    folder = out or Path(time.strftime("study-%Y%m%d-%H%M%S"))
    raise typer.Exit(_run(asked.model_copy(update={"part": parts}), path, folder))


def _example() -> Path:
    return Path(str(files("loadgen.study") / "example.toml"))


def _run(asked: Study, path: Path, folder: Path) -> int:
    try:
        folder.mkdir(parents=True)
        shutil.copy(path, folder / "study.toml")
    except OSError as error:
        raise InvalidRequest(f"{folder} cannot be a new folder for results: {error}") from error
    errors = Console(stderr=True)
    with (
        contextlib.closing(StopSwitch()) as stop,
        errors.status("starting") as status,
        stopping(stop),
    ):
        recorder = Recorder(errors, status, stop)
        ways = Ways(recorder, _calibration(asked, folder, errors), lambda _: not stop.is_set)
        runs = []
        for number, (part, case, way) in enumerate(_all(asked), 1):
            errors.print(f"{part.title}: {case.name}, {way}", highlight=False, markup=False)
            with ways.opened(part, case, way) as opened:
                found = _seeds(asked, part, case, way, opened, folder / f"{number:02d}", stop)
            if stop.is_set:
                break
            runs.append(Runs(part.title, case.name, way, found, tuple(opened.notes)))
        was_stopped = stop.is_set
    if runs:
        _sum_up(StudyResults(asked, tuple(runs)), folder)
    return INTERRUPTED_STATUS if was_stopped else 0


def _all(asked: Study) -> Iterator[tuple[Part, Case, Way]]:
    for part in asked.part:
        for case in part.case:
            for way in part.ways:
                yield part, case, way


def _seeds(
    asked: Study, part: Part, case: Case, way: Way, opened: Opened, place: Path, stop: StopSwitch
) -> tuple[dict[str, Any], ...]:
    """A summary a seed; none any more once it is to stop."""
    summaries = []
    for seed in asked.seeds:
        if stop.is_set:
            break
        run = place.with_name(f"{place.name}-{_slug(part.title)}-{_slug(case.name)}-{way}-{seed}")
        scenario = part.load.scenario(seed, place.with_name("rows.csv"))
        summaries.append(opened.measure(scenario, run))
    return tuple(summaries)


def _slug(words: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in words.lower()).strip("-")[:32]


def _calibration(asked: Study, folder: Path, errors: Console) -> Calibration | None:
    """This machine's parts, where real runs are predicted; kept with the results."""
    real = [part.model for part in asked.part if {Way.REAL, Way.SIMULATED} <= set(part.ways)]
    if not real:
        return None
    if len(set(real)) > 1:
        raise InvalidRequest(f"real runs that are simulated too have one model, not {', '.join(set(real))}")
    from anabranch.cli.bench.calibration import measure

    found = measure(
        model_store.resolve(real[0]), "bfloat16", lambda words: errors.print(words, highlight=False)
    )
    (folder / "calibration.json").write_text(found.to_json() + "\n", "utf-8")
    return found


def _sum_up(results: StudyResults, folder: Path) -> None:
    """The file, the page, the archive, and what is printed."""
    from anabranch.cli.bench import results_file

    told = {
        "commit": results_file.commit(),
        "command": results_file.command(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": results_file.machine(),
    }
    whole = told | {"seeds": list(results.study.seeds), "runs": results.told()}
    (folder / RESULTS).write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
    (folder / PAGE).write_text(render(study_page(results, told)), "utf-8")
    archive = folder.with_name(f"{folder.name}.tar.gz")
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder, folder.name)
    console = Console()
    console.width = max(console.width, _WIDTH)
    for part in results.study.part:
        console.print(_table(part, results))
    for line in _remarks(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nwritten to {folder} and {archive}", highlight=False, markup=False)


def _remarks(results: StudyResults) -> Iterator[str]:
    """What ways do not agree on, and what makes runs doubtful."""
    for runs, key, off in results.beyond:
        yield f"{runs.part}, {runs.case}: simulated {key} is {off:+.1%} off the emulated; aim {WITHIN:.0%}"
    for runs in results.runs:
        for note in runs.notes:
            yield f"{runs.case}, {runs.way}: {note}"


def _table(part: Part, results: StudyResults) -> Table:
    told = part_table(part, results)
    table = Table(title=part.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=True)
    for number, name in enumerate(told.head):
        table.add_column(name, justify="left" if number < 2 else "right")
    for row in told.rows:
        table.add_row(*row)
    return table
