"""What `generate` and `chat` share: how to reach a cluster, and how tokens are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch.client import Client
from cluster import config as configuration
from cluster.config import TlsConfig
from cluster.errors import NotFound
from controller.state import StateFolder

_OUTAGE_S = 10.0  # somebody waits at the terminal

Address = Annotated[
    str | None,
    typer.Option(
        help="Gateways' HOST:PORT, with commas between, or dns:///NAME:PORT for all that a name stands for; "
        "default: the cluster of this user."
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(help="Key of a cluster that asks for one.", envvar="ANABRANCH_API_KEY", show_envvar=True),
]
Authority = Annotated[
    Path | None, typer.Option(help="PEM certificates to trust; speaks TLS.", exists=True, dir_okay=False)
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="The cluster's YAML file, if it names state_dir or TLS.")
]
System = Annotated[str | None, typer.Option(help="Instructions before the conversation.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of an output.", min=1)]
Temperature = Annotated[float | None, typer.Option(help="0 takes the most likely token; default 1.")]
TopP = Annotated[float | None, typer.Option(help="Choose among the best tokens of this probability.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same output.", min=0)]


def connect(
    address: str | None, api_key: str | None, authority: Path | None, config_file: Path | None
) -> Client:
    """A client of what `reach` finds."""
    addresses, tls = reach(address, authority, config_file)
    return Client(addresses, api_key=api_key, tls=tls, outage_s=_OUTAGE_S)


def reach(
    address: str | None, authority: Path | None, config_file: Path | None
) -> tuple[tuple[str, ...], TlsConfig]:
    """The given gateways, or those of the cluster whose state folder the configuration names.

    Raises NotFound when no cluster is recorded there, or one that has no gateway yet.
    """
    config = configuration.load(config_file)
    addresses = tuple(address.split(",")) if address else StateFolder.of(config).read().gateways
    if not addresses:
        raise NotFound("the cluster is starting; wait until `anabranch status` shows its gateway as ready")
    return addresses, TlsConfig(authority=str(authority)) if authority else config.security.tls
