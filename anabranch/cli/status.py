"""`anabranch status`: the fleet of a running cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from google.protobuf import json_format
from rich.console import Console

from anabranch.cli.control import Control
from anabranch.cli.live import fleet_table

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="The cluster's YAML file, if it names state_dir or TLS.")
]
Address = Annotated[
    str | None, typer.Option(help="Controller's HOST:PORT; default: the cluster of this user.")
]


def status(
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print JSON instead of a table.")
    ] = False,
    address: Address = None,
    config_file: ConfigFile = None,
) -> None:
    """Show who lives, where, and how full the cache is.

    \b
    anabranch status
    anabranch status --json | jq '.membership.members[].worker_id'
    """
    with Control.open(address, config_file) as control:
        fleet = control.fleet()
    if as_json:
        print(json_format.MessageToJson(fleet, preserving_proto_field_name=True))
    else:
        Console().print(fleet_table(fleet))
