"""`anabranch drain`: let one worker leave a running cluster."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from anabranch.cli.control import Control
from anabranch.cli.status import Address, ConfigFile


def drain(
    worker: Annotated[str, typer.Argument(help="A worker as `anabranch status` names it: attention-1.")],
    grace_s: Annotated[
        float,
        typer.Option("--grace", min=0, help="Seconds its work gets to go elsewhere; then it is ended."),
    ] = 120.0,
    address: Address = None,
    config_file: ConfigFile = None,
) -> None:
    """Let one worker leave for good, without cutting a stream; returns when it has ended.

    A gateway finishes its streams, a dense worker hands its sequences to others, an attention worker's blocks
    move to others as far as they have room. The controller does not start it again. Kubernetes would, in the
    same pod: there, delete the pod or ask for fewer, which drains as well.

    \b
    anabranch drain attention-1
    anabranch drain dense-0 --grace 30
    """
    console = Console(stderr=True)
    with Control.open(address, config_file) as control, console.status(f"draining {worker}"):
        control.drain(worker, grace_s)
    console.print(f"{worker} has left")
