"""`anabranch config`: the configuration file, explained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster import config as configuration
from cluster.config_text import commented


def config_command(
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="A file to show with all it leaves out."),
    ] = None,
) -> None:
    """Print a configuration file with every key, its value and what it is.

    \b
    anabranch config > cluster.yaml && anabranch up --config cluster.yaml
    anabranch config --config cluster.yaml
    """
    print(commented(configuration.load(config_file)), end="")
