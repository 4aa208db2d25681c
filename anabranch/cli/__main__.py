"""The command line `anabranch`: composes its commands and turns errors into one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from anabranch.cli import model
from anabranch.cli.bench import command as bench
from anabranch.cli.chaos.command import chaos
from anabranch.cli.chat import chat_command
from anabranch.cli.config import config_command
from anabranch.cli.demo import demo
from anabranch.cli.doctor import doctor
from anabranch.cli.down import down
from anabranch.cli.drain import drain
from anabranch.cli.generate import generate_command
from anabranch.cli.loadgen import command as loadgen
from anabranch.cli.size import size_command
from anabranch.cli.status import status
from anabranch.cli.up import up
from cluster.ending import leave
from cluster.errors import AnabranchError, ConfigError, InvalidRequest, ModelError

_EPILOG = """\
Start with `anabranch demo`. Every command explains itself: `anabranch up --help`.

\b
Exit status of every command:
0  done
2  refused for what you can correct: a flag, a key, a file, the model's name or folder
1  anything else that failed; `up` also where a process had to be killed
"""

app = typer.Typer(
    name="anabranch",
    help="A distributed LLM serving cluster that computes attention where the KV cache lies.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(up)
app.command("config")(config_command)
app.command()(status)
app.command()(drain)
app.command()(down)
app.command()(doctor)
app.command("size")(size_command)
app.command("generate")(generate_command)
app.command("chat")(chat_command)
app.command()(chaos)
app.add_typer(model.app, name="model")
app.add_typer(bench.app, name="bench")
app.add_typer(loadgen.app, name="loadgen")

PROGRAMS = {"anabranch": app, "loadgen": loadgen.app}
"""What the console scripts run."""

_USER_ERRORS = (ConfigError, InvalidRequest, ModelError)


def main(program: typer.Typer = app) -> None:
    """Run one command of a program and leave with its exit status."""
    try:
        status = reporting(program)
    except SystemExit as end:  # how typer ends a command
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    leave(status)


def reporting(command: Callable[[], int | None]) -> int:
    """Run a command; an error of the tree becomes one line, and 2 if the user can correct it, else 1."""
    try:
        return command() or 0
    except AnabranchError as error:
        sys.stderr.write(f"anabranch: {error.message}\n")
        return 2 if isinstance(error, _USER_ERRORS) else 1


if __name__ == "__main__":
    main()
