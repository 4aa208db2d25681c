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

from anabranch.cli.generate import INTERRUPTED_STATUS
from anabranch.cli.loadgen.recording import Recorder, stopping
from anabranch.cli.loadgen.study.ways import Opened, Ways
from cluster import hardware
from cluster.errors import AnabranchError, InvalidRequest
from loadgen.pool import StopSwitch
from loadgen.report.page import render
from loadgen.report.study_page import part_table, study_page
from loadgen.results import PAGE
from loadgen.study.figures import WITHIN, Runs, StudyResults
from loadgen.study.study import Case, Part, Study, Way, read

_WIDTH = 150
RESULTS = "results.json"


def study(
    file: Annotated[
        Path | None,
        typer.Argument(help="The study. Default: the example, which takes an hour.", dir_okay=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A new folder for the results.")] = None,
    only: Annotated[str, typer.Option(help="Parts whose titles begin so. Default: all.")] = "",
    show: Annotated[bool, typer.Option(help="Print the example's file, to change it, and end.")] = False,
) -> None:
    """Measure a study's clusters in each way its file names: real, emulated, simulated; several seeds each.

    Every run is a folder of OUT with its requests and figures; OUT/results.json has them all with commit and
    machine, OUT/report.html shows them with intervals, OUT.tar.gz holds everything. Real clusters take all
    cores: nothing else should run meanwhile.

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
    asked.require_known(hardware.built_in())
    try:
        folder.mkdir(parents=True)
        shutil.copy(path, folder / "study.toml")
    except OSError as error:
        raise InvalidRequest(f"{folder} cannot be a new folder for results: {error}") from error
    errors = Console(stderr=True)
    runs: list[Runs] = []
    problems: list[str] = []
    with (
        contextlib.closing(StopSwitch()) as stop,
        errors.status("starting") as status,
        stopping(stop),
    ):
        try:
            recorder = Recorder(errors, status, stop)
            ways = Ways(recorder, lambda _: not stop.is_set)
            _go_through(asked, ways, folder, runs, problems)
        except AnabranchError:
            if not stop.is_set:
                raise
        finally:
            if runs:
                _sum_up(StudyResults(asked, tuple(runs)), folder)
        was_stopped = stop.is_set
    for problem in problems:
        errors.print(problem, markup=False, highlight=False, soft_wrap=True)
    return INTERRUPTED_STATUS if was_stopped else int(bool(problems))


def _go_through(asked: Study, ways: Ways, folder: Path, runs: list[Runs], problems: list[str]) -> None:
    """Every case in its ways. What one of them cannot do is a problem, and no reason to lose the others."""
    stop, errors = ways.recorder.stop, ways.recorder.console
    for number, (part, case, way) in enumerate(_all(asked), 1):
        if stop.is_set:
            return
        errors.print(f"{part.title}: {case.name}, {way}", highlight=False, markup=False)
        try:
            with ways.opened(part, case, way) as opened:
                found = _seeds(asked, part, case, way, opened, folder / f"{number:02d}", stop)
        except AnabranchError as error:
            if not stop.is_set:
                problems.append(f"{part.title}: {case.name}, {way}: {error.message}")
            continue
        if len(found) == len(asked.seeds):
            runs.append(Runs(part.title, case.name, way, found, tuple(opened.notes)))


def _all(asked: Study) -> Iterator[tuple[Part, Case, Way]]:
    for part in asked.part:
        for case in part.case:
            for way in sorted(part.ways, key=list(Way).index):
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
        scenario = part.load.scenario(seed, place.with_name(f"{place.name}-rows.csv"))
        summaries.append(opened.measure(scenario, run))
    return tuple(summaries)


def _slug(words: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in words.lower()).strip("-")[:32]


def _sum_up(results: StudyResults, folder: Path) -> None:
    """The file, the page, the archive, and what is printed."""
    from anabranch.cli.bench import results_file

    told = results_file.provenance()
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
        yield f"{runs.part}: {runs.case}: simulated {key} is {off:+.1%} off the {runs.way}; aim {WITHIN:.0%}"
    for runs in results.runs:
        for doubt in runs.doubts:
            yield f"{runs}: {doubt}"


def _table(part: Part, results: StudyResults) -> Table:
    told = part_table(part, results)
    table = Table(title=part.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=True)
    for number, name in enumerate(told.head):
        table.add_column(name, justify="left" if number < 2 else "right")
    for row in told.rows:
        table.add_row(*row)
    return table
