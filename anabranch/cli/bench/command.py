"""The commands of `anabranch bench`; each measures in a module of its own and reports here.

A bench is a function that returns results (`records`); its command adds options, calls it and gives what it
returned to `report`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from anabranch.cli.bench import results_file
from anabranch.cli.bench.records import Results, differences, records
from anabranch.cli.bench.table import results_table
from cluster.errors import InvalidRequest

app = typer.Typer(
    help="Measure the hot path, in turn with what it is compared to.",
    no_args_is_help=True,
)

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write the results into FILE, beside other benches'."),
]


def report(results: Results, json_file: Path | None) -> None:
    """Print the table, and write the file if one is asked for."""
    stamped = results_file.stamp(results)
    Console().print(results_table(stamped))
    if json_file is not None:
        results_file.write(json_file, stamped)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="What `--json` wrote.")],
) -> None:
    """Compute every number of a results file again from the samples beside it; a difference is an error."""
    results = results_file.read(file)
    found = differences(results)
    if found:
        raise InvalidRequest(f"{file}: {len(found)} differ:\n  " + "\n  ".join(found))
    print(f"{file}: {sum(1 for _ in records(results))} records follow from their samples")
