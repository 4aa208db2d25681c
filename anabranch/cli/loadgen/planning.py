"""`anabranch loadgen plan`: which shape to buy for a model, a workload, prices and objectives."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from anabranch.cli.loadgen import modelled as m
from anabranch.cli.loadgen import options as o
from cluster import hardware
from cluster.hardware import Catalogue
from loadgen import scenario as scenarios
from loadgen.metrics import Objectives
from loadgen.scenario import Scenario
from loadgen.simulation import models
from loadgen.simulation.advice import Advice, Candidate, advise
from loadgen.simulation.capacity import Point, Setting, Traffic
from loadgen.simulation.machines import Efficiencies
from loadgen.simulation.steps import Switches

_WIDTH = 140
_DRAWN_REQUESTS = 5000
"""Of a fit or of distributions, for their means."""

Kinds = Annotated[
    str,
    typer.Option(metavar="KIND[,...]", help="Only this hardware; default: all of the catalogue."),
]
Rate = Annotated[
    float | None,
    typer.Option(help="Requests per second to be served. Default: the workload's own, where it has one."),
]
Duration = Annotated[
    float,
    typer.Option(
        help="Seconds for which ServeGen's clients are drawn; other traces are taken whole.", min=0.1
    ),
]
Shown = Annotated[int, typer.Option(help="Shapes shown of each way.", min=1)]


def plan(
    model: m.ModelShapeName = "llama3-70b",
    hardware_file: m.Hardware = None,
    prices: o.PricesFile = None,
    kinds: Kinds = "",
    shown: Shown = 3,
    efficiency: m.EfficiencyText = "",
    overlap: m.Overlap = True,
    stagger: m.Stagger = True,
    prompts_elsewhere: m.PromptsElsewhere = False,
    workload: m.Workload = "",
    trace_file: o.TraceFile = None,
    prompt: o.Prompt = "512",
    output: o.Output = "128",
    rate: Rate = None,
    duration: Duration = 3600.0,
    context: o.Context = None,
    slo: o.Slo = "",
    seed: o.LoadSeed = 0,
) -> None:
    """Search devices for dense work and for attention over the catalogue, and say whether to disaggregate.

    In closed form, from rooflines and the means of the workload: at saturation, and at the largest batch
    whose mean latencies keep --slo. Queues and tails are left out; `simulate` has them, for one shape.

    \b
    anabranch loadgen plan --model llama3-70b --trace azure-conv --slo tpot:60
    anabranch loadgen plan --trace kimi-conv --kinds h100,h20 --prompts-elsewhere
    anabranch loadgen plan --model FOLDER --prices mine.toml --prompt 4096 --output 512 --rate 2
    """
    workload, trace_file = m.workload_source(workload, trace_file)
    scenario = Scenario(
        seed=seed,
        duration_s=duration,
        workload=workload,
        trace_file=trace_file,
        prompt=prompt,
        output=output,
        context=context,
    )
    requests, recorded_rate = scenarios.recorded(scenario)
    resolved = models.resolve(model)
    # Only means are looked at: every request once, whenever it came.
    whole = replace(scenario, concurrency=(1,), requests=requests or _DRAWN_REQUESTS)
    load = scenarios.plan(whole, min(filter(None, (context, resolved.context_tokens))))
    traffic = replace(Traffic.of_plan(load), rate=rate or recorded_rate)
    setting = Setting(
        resolved, traffic, Efficiencies.parse(efficiency), Switches(overlap, stagger), prompts_elsewhere
    )
    catalogue = _only(m.catalogue(hardware_file, prices), kinds)
    objectives = Objectives.parse(slo)
    console = Console()
    console.width = max(console.width, _WIDTH)
    for note in load.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    _print(console, advise(catalogue, setting, objectives, shown), setting)


def _only(catalogue: Catalogue, kinds: str) -> Catalogue:
    names = [name for name in kinds.split(",") if name]
    hardware.require(names, catalogue)
    return {name: item for name, item in catalogue.items() if not names or name in names}


def _print(console: Console, advice: Advice, setting: Setting) -> None:
    traffic = setting.traffic
    where = "elsewhere" if setting.prompts_elsewhere else "on the same cluster"
    console.print(
        f"{setting.model.name}: prompts of {traffic.prompt_tokens:,.1f} tokens, computed {where}, outputs of "
        f"{traffic.output_tokens:,.1f}",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("shape", "$/h", "at saturation", "within the objectives", "limited by", "clusters"):
        table.add_column(column)
    for candidate in (*advice.homogeneous, *advice.disaggregated):
        table.add_row(*_row(candidate, traffic))
    console.print(table)
    console.print("* cannot be deployed yet: a dense worker is one device today", highlight=False)
    for line in m.prices_of(candidate.shape for candidate in (*advice.homogeneous, *advice.disaggregated)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if traffic.rate is not None:
        console.print(f"clusters: how many {traffic.rate:.2f} requests/s need", highlight=False)
    console.print(advice.verdict, highlight=False, markup=False, soft_wrap=True)


def _row(candidate: Candidate, traffic: Traffic) -> tuple[str, ...]:
    shape, clusters = candidate.shape, "-"
    mark = "" if shape.is_deployable else " *"
    if traffic.rate is not None:
        clusters = f"{traffic.rate * traffic.output_tokens / candidate.chosen.tokens_per_s:.2f}"
    return (
        f"{shape}{mark}",
        f"{shape.price_per_hour_usd:.2f}",
        _point(candidate.saturated, traffic),
        "-" if candidate.within is None else _point(candidate.within, traffic),
        candidate.bottleneck,
        clusters,
    )


def _point(point: Point, traffic: Traffic) -> str:
    return (
        f"{point.tokens_per_s:,.0f} tok/s, {point.tokens_per_s / traffic.output_tokens:.2f} req/s, batch "
        f"{point.batch:.0f},\nTPOT {point.step_s * 1000:.1f} ms, ${point.usd_per_mtok:.3f}/Mtok"
    )
