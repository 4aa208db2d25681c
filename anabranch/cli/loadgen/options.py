"""The options of `anabranch loadgen run`, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.options import reach
from cluster import hardware, prices
from cluster.config import TlsConfig
from cluster.errors import InvalidRequest
from loadgen.cost import Bill
from loadgen.scenario import DURATION_S, REQUESTS, ArrivalKind

_TARGET, _LOAD, _WORKLOAD, _MEASURE, _COST = "Target", "Load", "Workload", "Measurement", "Cost"

OpenAi = Annotated[
    str | None,
    typer.Option(
        "--openai",
        metavar="URL",
        help="Measure this OpenAI-compatible endpoint instead of a cluster over gRPC.",
        rich_help_panel=_TARGET,
    ),
]
Model = Annotated[str, typer.Option(help="Model's name; default: the one served.", rich_help_panel=_TARGET)]
TimeoutS = Annotated[
    float,
    typer.Option("--timeout", help="Seconds after which a request failed.", min=0.1, rich_help_panel=_TARGET),
]
HonourEos = Annotated[
    bool,
    typer.Option(
        "--honour-eos",
        help="Let outputs end where the model ends them, instead of at the planned length.",
        rich_help_panel=_TARGET,
    ),
]
Arrivals = Annotated[
    ArrivalKind | None,
    typer.Option(
        help="Open loop: how sessions begin; default: as the trace or the named workload, else poisson.",
        rich_help_panel=_LOAD,
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(
        help="Sessions begun per second; a replayed trace is sped up or slowed down to it.",
        rich_help_panel=_LOAD,
    ),
]
RateEnd = Annotated[float | None, typer.Option(help="Rate at the end of a ramp.", rich_help_panel=_LOAD)]
Cv = Annotated[
    float | None,
    typer.Option(
        help="Coefficient of variation of gamma gaps: 1 is Poisson, above is bursty.", rich_help_panel=_LOAD
    ),
]
Concurrency = Annotated[
    str,
    typer.Option(
        metavar="N[,N...]",
        help="Closed loop: numbers of users, one stage each; a user asks again when answered.",
        rich_help_panel=_LOAD,
    ),
]
Requests = Annotated[
    int | None,
    typer.Option(
        help=f"Requests, of each stage in a closed loop (default there: {REQUESTS}).",
        min=1,
        rich_help_panel=_LOAD,
    ),
]
Duration = Annotated[
    float | None,
    typer.Option(
        help=f"Seconds in which requests are begun; default of an open loop: {DURATION_S:g}, or the trace's.",
        min=0.1,
        rich_help_panel=_LOAD,
    ),
]
WarmUp = Annotated[
    float,
    typer.Option(help="First seconds of each stage that do not count.", min=0.0, rich_help_panel=_LOAD),
]
Think = Annotated[
    float,
    typer.Option(
        help="Mean pause before a user's next request, in seconds; exponential.",
        min=0.0,
        rich_help_panel=_LOAD,
    ),
]
Workload = Annotated[
    str,
    typer.Option(
        help="Fitted to a published trace: azure-conv, azure-code or kimi-conv.", rich_help_panel=_WORKLOAD
    ),
]
TraceFile = Annotated[
    Path | None,
    typer.Option(
        help="Azure CSV, Mooncake JSON lines, a list of lengths, or ServeGen's folder or archive.",
        exists=True,
        rich_help_panel=_WORKLOAD,
    ),
]
TraceFrom = Annotated[
    float,
    typer.Option(help="Seconds of the trace that are passed over.", min=0.0, rich_help_panel=_WORKLOAD),
]
Prompt = Annotated[
    str,
    typer.Option(
        "--prompt", help="Tokens: 512, uniform:64:256 or lognormal:MEAN:CV.", rich_help_panel=_WORKLOAD
    ),
]
Output = Annotated[str, typer.Option("--output", help="The same of outputs.", rich_help_panel=_WORKLOAD)]
LengthScale = Annotated[
    float, typer.Option(help="Multiplies all lengths, shared blocks included.", rich_help_panel=_WORKLOAD)
]
Context = Annotated[
    int | None,
    typer.Option(
        help="Longest sequence; what is longer is clipped. Default: the model's.",
        min=2,
        rich_help_panel=_WORKLOAD,
    ),
]
Turns = Annotated[
    int,
    typer.Option(
        help="Requests of a session: each continues the one before, and its answer.",
        min=1,
        rich_help_panel=_WORKLOAD,
    ),
]
Text = Annotated[
    bool,
    typer.Option(
        "--text",
        help="Prompts of words, about as long as planned, instead of random token ids.",
        rich_help_panel=_WORKLOAD,
    ),
]
Vocabulary = Annotated[
    int | None,
    typer.Option(
        help="Token ids to draw from, for --openai, which is else asked in words.",
        min=8,
        rich_help_panel=_WORKLOAD,
    ),
]
Slo = Annotated[
    str,
    typer.Option(
        metavar="NAME:MS[,...]",
        help="Objectives for goodput, for example ttft:500,tpot:50; also e2el.",
        rich_help_panel=_MEASURE,
    ),
]
Shape = Annotated[
    str,
    typer.Option(
        metavar="ROLE=NxKIND[,...]",
        help="What is paid for, for example dense=1xh100,attention=2xh20: shows what tokens cost.",
        rich_help_panel=_COST,
    ),
]
PricesFile = Annotated[
    Path | None,
    typer.Option(
        "--prices",
        metavar="FILE",
        help="TOML: a table for each kind with price_per_hour_usd, price_date and source, in the place of "
        "the hardware catalogue's prices, some of which are examples only.",
        exists=True,
        dir_okay=False,
        rich_help_panel=_COST,
    ),
]
Dilation = Annotated[
    float | None,
    typer.Option(
        help="Times are divided by it. Default: what the cluster says, which another number must not "
        "contradict (see `anabranch up --emulate`); over --openai, which does not tell, 1.",
        min=1.0,
    ),
]
Senders = Annotated[int, typer.Option(help="Processes that send.", min=1, max=64, rich_help_panel=_MEASURE)]
LoadSeed = Annotated[
    int,
    typer.Option(
        "--seed",
        help="The same seed gives the same moments and lengths; contents are new in each run, lest the "
        "cache of an earlier one help.",
        min=0,
        rich_help_panel=_MEASURE,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="New folder for requests.jsonl, summary.jsonl and report.html; default: loadgen-DATE-TIME.",
        rich_help_panel=_MEASURE,
    ),
]


def endpoints(
    address: str | None, authority: Path | None, config_file: Path | None, openai: str | None
) -> tuple[tuple[str, ...], TlsConfig]:
    """Gateways to send to, none where --openai names the server; raises what `reach` raises."""
    if openai is None:
        return reach(address, authority, config_file)
    return (), TlsConfig(authority=str(authority) if authority else None)


def bill(shape: str, prices_file: Path | None) -> Bill | None:
    """What --shape and --prices say; None without a shape. Raises InvalidRequest."""
    if shape:
        catalogue = hardware.built_in()
        return Bill.parse(shape, prices.known(catalogue, prices_file), catalogue)
    if prices_file:
        raise InvalidRequest("--prices needs a --shape: how many devices of which kind are paid for")
    return None
