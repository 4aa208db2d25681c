"""`anabranch down`: stop a running cluster and wait until it is gone."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from anabranch.cli.control import Control
from anabranch.cli.status import Address, ConfigFile


def down(
    grace_s: Annotated[float, typer.Option("--grace", min=0, help="Seconds open streams get.")] = 10.0,
    now: Annotated[bool, typer.Option("--now", metavar="", help="Kill everything at once.")] = False,
    address: Address = None,
    config_file: ConfigFile = None,
) -> None:
    """Drain and stop the cluster; returns when nothing of it runs any more.

    \b
    anabranch down
    anabranch down --grace 60
    """
    console = Console(stderr=True)
    with Control.open(address, config_file) as control, console.status("draining"):
        control.shut_down(0.0 if now else grace_s)
    console.print("stopped")
