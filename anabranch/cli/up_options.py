"""The options of `anabranch up`, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.config_text import default_of

_EMULATION = "Emulation"


def about(key: str, words: str) -> str:
    """What a flag says of the key it sets."""
    default = default_of(key)
    return f"{words} ({key})." if default == "null" else f"{words} ({key}; default {default})."


Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any key: --set dense.threads=2. Repeatable.")
]
Model = Annotated[
    str | None,
    typer.Option(help=about("model.path", "Model folder, or a name of `anabranch model list`")),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file (`anabranch config` prints one); flags override it."),
]
Gateways = Annotated[int | None, typer.Option(help=about("gateway.replicas", "Gateway processes"))]
Dense = Annotated[int | None, typer.Option(help=about("dense.replicas", "Dense workers"))]
Attention = Annotated[
    int | None,
    typer.Option(
        help=about("attention.replicas", "Attention workers, 0 keeps the cache in the dense worker")
    ),
]
Arena = Annotated[
    str | None,
    typer.Option(help=about("attention.arena", "KV cache per worker, for example 2GiB or 2GB")),
]
Dtype = Annotated[str | None, typer.Option(help=about("model.dtype", "float32, bfloat16 or float16"))]
Port = Annotated[
    int | None, typer.Option(help=about("gateway.port", "gRPC port of the first gateway, 0 draws one"))
]
HttpPort = Annotated[
    int | None,
    typer.Option(help=about("gateway.http_port", "HTTP port of the first gateway, 0 draws one")),
]
Host = Annotated[
    str | None,
    typer.Option(help=about("gateway.host", "Host every server binds, for example 0.0.0.0")),
]
RayAddress = Annotated[
    str | None,
    typer.Option(help=about("ray.address", "Join this Ray cluster (HOST:PORT) instead of starting one")),
]
Insecure = Annotated[bool, typer.Option("--insecure", metavar="", help="Allow plain text beyond loopback.")]
Emulate = Annotated[
    str | None,
    typer.Option(
        metavar="KINDxN[,KINDxN]",
        help="Keep the time of these devices: a dense worker's, and attention workers.",
        rich_help_panel=_EMULATION,
    ),
]
ModelShape = Annotated[
    str,
    typer.Option(help="Whose steps are timed; a tiny model is computed.", rich_help_panel=_EMULATION),
]
Dilation = Annotated[
    float, typer.Option(help="How many times slower everything is.", rich_help_panel=_EMULATION)
]
