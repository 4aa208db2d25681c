"""`anabranch demo`: the whole thing once, on this machine."""

from __future__ import annotations

import typer
from rich.console import Console


def demo() -> None:
    """Serve a real model from a cluster on this machine and ask it two questions.

    Fetches SmolLM2-135M-Instruct (93 MB, once), starts a gateway, a dense worker and two attention
    workers, and shows where the KV cache of the long question lies. Takes about a minute after the
    download. Exit status 0 means that everything went as promised.
    """
    # Here, not above: Ray takes half a second to import, which `--help` need not wait for.
    from anabranch.cli.demonstration import run

    raise typer.Exit(run(Console()))
