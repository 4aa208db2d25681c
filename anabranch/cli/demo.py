"""`anabranch demo`: the whole thing once, on this machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console


def demo(
    long: Annotated[
        bool,
        typer.Option("--long", help="One request of 7,900 tokens over eight workers that hold 1,000 each."),
    ] = False,
) -> None:
    """Serve a real model from a cluster on this machine and ask it two questions.

    Fetches SmolLM2-135M-Instruct (93 MB, once), starts a gateway, a dense worker and two attention
    workers, and shows where the KV cache of the long question lies. Takes about a minute after the
    download, with --long some minutes. Exit status 0 means that everything went as promised.
    """
    # Here, not above: Ray takes half a second to import, which `--help` need not wait for.
    from anabranch.cli import demonstration, long_demonstration

    run = long_demonstration.run if long else demonstration.run
    raise typer.Exit(run(Console()))
