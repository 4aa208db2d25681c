"""The options of `anabranch loadgen simulate` and `plan`, each with its help, and what they mean together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from cluster import hardware, prices
from cluster.hardware import Catalogue
from loadgen import published
from loadgen.simulation.machines import Shape

_CLUSTER, _PHYSICS = "Cluster", "Physics"

ModelShapeName = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="NAME|FOLDER",
        help="llama3-70b and others (a wrong name lists them), or a folder with a config.json.",
        rich_help_panel=_CLUSTER,
    ),
]
Dense = Annotated[
    str,
    typer.Option(
        metavar="KINDxN", help="Devices of a dense worker, for example h100x2.", rich_help_panel=_CLUSTER
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        metavar="KINDxN",
        help="Attention workers, one device each; without it the cache lies beside the weights.",
        rich_help_panel=_CLUSTER,
    ),
]
DenseWorkers = Annotated[
    int,
    typer.Option(help="Dense workers, which share the attention workers.", min=1, rich_help_panel=_CLUSTER),
]
Hardware = Annotated[
    Path | None,
    typer.Option(
        "--hardware",
        metavar="FILE",
        help="Your hardware with its prices: a file like cluster/hardware.toml. Default: the built-in one.",
        exists=True,
        dir_okay=False,
        rich_help_panel=_CLUSTER,
    ),
]
EngineSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any key of the configuration: --set dense.step_tokens=4096. Repeatable.",
        rich_help_panel=_CLUSTER,
    ),
]
EngineConfig = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A cluster's YAML file, for its engine settings. Default: settings that suit accelerators.",
        rich_help_panel=_CLUSTER,
    ),
]
EfficiencyText = Annotated[
    str,
    typer.Option(
        "--efficiency",
        metavar="NAME=VALUE[,...]",
        help="What devices reach: flops, bandwidth, network, memory as shares; round_trip_s, step_s, call_s. "
        "Default: rooflines, which is what cannot be beaten.",
        rich_help_panel=_PHYSICS,
    ),
]
Overlap = Annotated[
    bool,
    typer.Option(help="Keys and values travel while old tokens are attended to.", rich_help_panel=_PHYSICS),
]
Stagger = Annotated[
    bool, typer.Option(help="Two micro-batches in rotation where that is faster.", rich_help_panel=_PHYSICS)
]
PromptsElsewhere = Annotated[
    bool,
    typer.Option(
        "--prompts-elsewhere",
        help="Prompts cost nothing here: another cluster computes them, as in Lamina's measurements.",
        rich_help_panel=_PHYSICS,
    ),
]
Workload = Annotated[
    str,
    typer.Option(
        "--workload",
        "--trace",
        help="azure-conv, azure-code or kimi-conv: the published file where ANABRANCH_TRACES names its "
        "folder, else its fit.",
        rich_help_panel="Workload",
    ),
]


def catalogue(hardware_file: Path | None, prices_file: Path | None) -> Catalogue:
    """What --hardware and --prices say. Raises ConfigError for the one, InvalidRequest for the other."""
    return prices.repriced(hardware.load(str(hardware_file) if hardware_file else None), prices_file)


def prices_of(shapes: Iterable[Shape]) -> list[str]:
    """A line for each kind of device: its price, when that was so, and who says it."""
    known = {devices.kind: devices.price for shape in shapes for _, devices in shape.bill.roles}
    return [f"price of a {kind}: {price}" for kind, price in known.items()]


def workload_source(workload: str, trace_file: Path | None) -> tuple[str, Path | None]:
    """(named fit, file): the published file in the place of its fit, where it is there."""
    found = published.file_of(workload) if workload and trace_file is None else None
    return ("", found) if found is not None else (workload, trace_file)
